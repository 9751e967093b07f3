// Products with packed weights on a CPU, straight from the tensors of a checkpoint; lutq/cpu.py calls them.
//
//   y[m,n] = sum_G ( sum_i scales[i,n,G] * sum_{k in G} s_i[n,k] x[m,k]  +  offsets[n,G] * sum_{k in G} x[m,k] )
//
// A sign is half of 2 bit - 1, so the inner sum is twice the sum of the inputs whose bit is set, less the sum of all: a word of a
// plane is two masks of 16 lanes (AVX-512) or four of 8 (AVX2) over additions of x. It is compiled for the machine that it runs on.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <unistd.h>

struct Weights {              // of lutq/cpu.py
  const uint32_t* codes;      // [bits, N, words]
  const uint16_t* scales;     // fp16 [bits, N, groups], on the uniform grid [1, N, groups]
  const uint16_t* offsets;    // fp16 [N, groups], or null
  const uint8_t* zero_points; // [N, groups], or null
  int64_t N, words, groups, group_words;
  int32_t bits, uniform;
};

struct Product {
  const float* x;     // [M, 32 words], zeros beyond K
  const float* sums;  // [M, groups] of x
  float* y;           // [M, N]
  int64_t M;
};

namespace {

constexpr int ROWS = 4;        // of x at a time
constexpr int64_t SHARE = 16;  // rows of W that a thread takes at a time

inline float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  float v = (float)mantissa * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (exponent) bits = (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  bits |= sign;
  std::memcpy(&v, &bits, 4);
  return v;
#endif
}

// What the sum of plane i's inputs is worth in a group, and what the sum of all of them is.
inline float plane_worth(const Weights& w, int64_t n, int64_t group, int i) {
  if (w.uniform) return from_half(w.scales[n * w.groups + group]) * (float)(1 << (w.bits - 1 - i));
  return 2.f * from_half(w.scales[(i * w.N + n) * w.groups + group]);
}
inline float rest_worth(const Weights& w, int64_t n, int64_t group) {
  const int64_t at = n * w.groups + group;
  if (w.uniform) {
    const float zero = w.zero_points ? (float)w.zero_points[at] : 0.5f * (float)((1 << w.bits) - 1);
    return -from_half(w.scales[at]) * zero;
  }
  float rest = w.offsets ? from_half(w.offsets[at]) : 0.f;
  for (int i = 0; i < w.bits; i++) rest -= from_half(w.scales[(i * w.N + n) * w.groups + group]);
  return rest;
}

// Sums of x, lane by lane.
#if defined(__AVX512F__)
struct Sum {
  __m512 v[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  void add(uint32_t word, const float* x) {
    v[0] = _mm512_mask_add_ps(v[0], (__mmask16)word, v[0], _mm512_loadu_ps(x));
    v[1] = _mm512_mask_add_ps(v[1], (__mmask16)(word >> 16), v[1], _mm512_loadu_ps(x + 16));
  }
  void add(float by, const Sum& other) {
    for (int t = 0; t < 2; t++) v[t] = _mm512_fmadd_ps(_mm512_set1_ps(by), other.v[t], v[t]);
  }
  float all() const { return _mm512_reduce_add_ps(_mm512_add_ps(v[0], v[1])); }
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Sum {
  __m256 v[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  void add(uint32_t word, const float* x) {
    const __m256i all = _mm256_set1_epi32((int)word);
    for (int t = 0; t < 4; t++) {  // a lane's bit goes to its sign
      const __m256i shifts = _mm256_sub_epi32(_mm256_set1_epi32(31 - 8 * t), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      const __m256 mask = _mm256_castsi256_ps(_mm256_srai_epi32(_mm256_sllv_epi32(all, shifts), 31));
      v[t] = _mm256_add_ps(v[t], _mm256_and_ps(mask, _mm256_loadu_ps(x + 8 * t)));
    }
  }
  void add(float by, const Sum& other) {
    for (int t = 0; t < 4; t++) v[t] = _mm256_fmadd_ps(_mm256_set1_ps(by), other.v[t], v[t]);
  }
  float all() const {
    float lanes[8], sum = 0.f;
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(v[0], v[1]), _mm256_add_ps(v[2], v[3])));
    for (float lane : lanes) sum += lane;
    return sum;
  }
};
#else
struct Sum {
  float v[32] = {};
  void add(uint32_t word, const float* x) {
    for (int t = 0; t < 32; t++) {  // x or nothing, by a mask: what vectors do, too
      uint32_t bits;
      std::memcpy(&bits, x + t, 4);
      bits &= 0u - (word >> t & 1);
      float kept;
      std::memcpy(&kept, &bits, 4);
      v[t] += kept;
    }
  }
  void add(float by, const Sum& other) {
    for (int t = 0; t < 32; t++) v[t] += by * other.v[t];
  }
  float all() const {
    float sum = 0.f;
    for (float lane : v) sum += lane;
    return sum;
  }
};
#endif

// row[t] += by for the bits of a word.
inline void add_bits(float* row, uint32_t word, float by) {
#if defined(__AVX512F__)
  const __m512 v = _mm512_set1_ps(by), low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + 16);
  _mm512_storeu_ps(row, _mm512_mask_add_ps(low, (__mmask16)word, low, v));
  _mm512_storeu_ps(row + 16, _mm512_mask_add_ps(high, (__mmask16)(word >> 16), high, v));
#else
  for (int t = 0; t < 32; t++) row[t] += by * (float)(word >> t & 1);
#endif
}

// Rows [first, last) of W for M rows of x.
template <int M> void rows(const Weights& w, const float* x, const float* sums, float* y, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n++) {
    Sum total[M];
    float rest[M] = {};
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t begin = group * w.group_words, end = std::min(begin + w.group_words, w.words);
      for (int i = 0; i < w.bits; i++) {
        const uint32_t* const codes = w.codes + (i * w.N + n) * w.words;
        Sum sum[M];
        for (int64_t k = begin; k < end; k++)
          for (int m = 0; m < M; m++) sum[m].add(codes[k], x + (m * w.words + k) * 32);
        const float by = plane_worth(w, n, group, i);
        for (int m = 0; m < M; m++) total[m].add(by, sum[m]);
      }
      const float worth = rest_worth(w, n, group);
      for (int m = 0; m < M; m++) rest[m] += worth * sums[m * w.groups + group];
    }
    for (int m = 0; m < M; m++) y[m * w.N + n] = total[m].all() + rest[m];
  }
}

void multiply(const Weights& w, const Product& p, int64_t first, int64_t last) {
  for (int64_t m = 0; m < p.M; m += ROWS) {
    const float *x = p.x + m * w.words * 32, *sums = p.sums + m * w.groups;
    float* y = p.y + m * w.N;
    switch (std::min<int64_t>(ROWS, p.M - m)) {
      case 1: rows<1>(w, x, sums, y, first, last); break;
      case 2: rows<2>(w, x, sums, y, first, last); break;
      case 3: rows<3>(w, x, sums, y, first, last); break;
      default: rows<4>(w, x, sums, y, first, last);
    }
  }
}

// Rows of W, fp32 [last - first, K].
void dequantize(const Weights& w, float* out, int64_t K, int64_t first, int64_t last) {
  std::vector<float> row(w.words * 32);
  for (int64_t n = first; n < last; n++, out += K) {
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t begin = group * w.group_words, end = std::min(begin + w.group_words, w.words);
      std::fill(row.begin() + begin * 32, row.begin() + end * 32, rest_worth(w, n, group));
      for (int i = 0; i < w.bits; i++) {
        const uint32_t* const codes = w.codes + (i * w.N + n) * w.words;
        const float by = plane_worth(w, n, group, i);
        for (int64_t k = begin; k < end; k++) add_bits(row.data() + k * 32, codes[k], by);
      }
    }
    std::memcpy(out, row.data(), K * sizeof(float));
  }
}

// Threads that wait for work; one pool per process, made anew after a fork.
class Pool {
 public:
  static Pool& get() {
    static std::mutex making;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(making);
    if (!pool || owner != getpid()) pool = new Pool, owner = getpid();  // one of a parent has no threads here
    return *pool;
  }

  // work(first, last) over [0, count), by so many threads, this one among them.
  void run(int threads, int64_t count, const std::function<void(int64_t, int64_t)>& work) {
    std::lock_guard<std::mutex> alone(running);
    int helpers = (int)std::max<int64_t>(0, std::min<int64_t>(threads, (count + SHARE - 1) / SHARE) - 1);
    try {
      for (; size < helpers; size++) std::thread([this, id = size, seen = turn] { serve(id, seen); }).detach();
    } catch (const std::system_error&) {  // the system has no more
      helpers = size;
    }
    {
      std::lock_guard<std::mutex> lock(mutex);
      job = &work, total = count, next = 0, wanted = helpers, left = helpers, turn++;
    }
    start.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [this] { return left == 0; });
  }

 private:
  void take() {
    for (int64_t first; (first = next.fetch_add(SHARE)) < total;) (*job)(first, std::min(first + SHARE, total));
  }
  void serve(int id, uint64_t seen) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        start.wait(lock, [&] { return turn != seen; });
        seen = turn;
        if (id >= wanted) continue;
      }
      take();
      std::lock_guard<std::mutex> lock(mutex);
      if (--left == 0) done.notify_one();
    }
  }

  std::mutex running, mutex;
  std::condition_variable start, done;
  const std::function<void(int64_t, int64_t)>* job = nullptr;
  std::atomic<int64_t> next{0};
  int64_t total = 0;
  uint64_t turn = 0;
  int size = 0, wanted = 0, left = 0;  // threads: there are, for the job, still at work
};

}  // namespace

extern "C" {

// y = x W^T.
void lutq_cpu_multiply(const Weights* w, const Product* p, int threads) {
  Pool::get().run(threads, w->N, [&](int64_t first, int64_t last) { multiply(*w, *p, first, last); });
}

// Rows [begin, end) of W as fp32 [end - begin, K].
void lutq_cpu_dequantize(const Weights* w, float* out, int64_t K, int64_t begin, int64_t end, int threads) {
  Pool::get().run(threads, end - begin,
                  [&](int64_t first, int64_t last) { dequantize(*w, out + first * K, K, begin + first, begin + last); });
}
}
