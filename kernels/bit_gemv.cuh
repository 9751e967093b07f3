// y = x W^T + bias for one row of x, by binary tensor cores.
//
//   y[n] = sum_G sum_i scales[i,n,G] * sum_{k in G} s_i[n,k] x[k] + offsets[n,G] * sum_{k in G} x[k] + bias[n]
//
// A product of bits (m16n8k128) counts in how many of 128 places a row of W and a column of x both have a bit. Rows are planes,
// nearly as they are packed. Columns are the bits of x: the 128 inputs of a block become integers |m| < 2^22, x = m 2^(e-22), in
// two's complement, whose 23 bits are the columns of three products. With bits b = (s + 1) / 2
//
//   1/2 sum_k s[k] m[k] = sum_j 2^j count[j] - 1/2 sum_k m[k]          (the last bit weighs -2^22)
//
// Lane 4 r + t gets the counts of six bits, 6 t and on, for the rows r and r + 8. A count, taken as the bits of a float, is a
// denormal number, count * 2^-149, so that a multiply-add takes it with its weight: exact, and arithmetic on integers would take
// twice the time. Each of the four lanes takes its own part of the last sum, near that of its digits, for what a lane adds up
// should be small.
//
// A block has some tiles, whole ones, and makes bits of all x, in passes if they are too many. Units of its tiles are dealt out
// to its warps in equal shares; each copies weights ahead into a ring of its own, before the previous kernel ends. A block takes
// more than half of a processor: of two that fit, one processor would get both where another gets none. Sums are added in the same
// order every time.
//
// A step of a decoder has norms before its products and sums and activations after them (lutq/decode/engine.py). This kernel does
// these, too, where it is told (`Fusion`): each block needs all of x anyway, and has whole outputs.
#pragma once
#include "step.cuh"

// What a product does besides. The field order is that of lutq/cuda.py.
struct Fusion {
  const void* weight;  // [K], or null: x, which is fp32 and has 16384 numbers at most, is taken by its norm
  const void* shift;   // [K], or null: of a LayerNorm
  float eps;
  int centered, dtype;  // of the norm: whether it is a LayerNorm; of weight and shift, 16 bits
  int function;         // decode::Function of the outputs, or -1
  int gated;            // whether y is [N / 2], outputs n, after the function, times outputs n + N / 2
  int add;              // whether y, which is fp32, is what was there plus what would be
};

namespace {

constexpr int BIT_WARPS = 16, BIT_THREADS = BIT_WARPS * 32, BIT_STAGES = 4, BIT_EARLY = 1;
constexpr int SPARE_THREADS = 128;  // for which registers are left: other kernels of a step begin while this one runs
constexpr int BLOCK_INPUTS = 128, BLOCK_BYTES = 512 + 16;  // of their bits: for each lane three words and a factor; then 4 halves
constexpr int PASS_UNITS = 64;                             // of whose inputs there are bits at a time, at most
constexpr int TOP = 22;                                    // |m| < 2^TOP, and bit TOP is its sign
constexpr float ROUND = 12582912.f;                        // 1.5 * 2^23: what is added to it is rounded to an integer
constexpr int LEAST_EXPONENT = -100, KEPT_SHIFT = 30;      // of x, at least; sums are 2^-30 times as large: fp32 holds all factors

// A unit of a tile, on its way to a warp.
template <int BITS, int GRID, bool OFFSETS> struct Slot {
  static constexpr int CODES = BITS * PLANE_BYTES, RECORD = GRID == BCQ ? (BITS + OFFSETS) * 32 : 32 + 16 * OFFSETS;
  static constexpr int BYTES = CODES + 2 * RECORD, VECTORS = RECORD / 16, RING = BIT_STAGES * BYTES;
};

// c += in how many places both a row of 16 (r in a0, r + 8 in a1) and a column of 8 have a bit.
__device__ __forceinline__ void count_both(uint32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// The larger magnitude, or NaN.
__device__ __forceinline__ float larger(float most, float v) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(fabsf(v)));
  return most;
}

// Where the fours of lane t in a block of 128 inputs, k and on, are: at 16 (t / 2) + 4 (t % 2) and every 8, then 24 further on.
__device__ __forceinline__ int four_at(int k, int t, int j) { return k + 16 * (t / 2) + 4 * (t % 2) + 16 * j - 8 * (j % 2); }

__device__ __forceinline__ float4 as_float4(uint2 raw, int dtype) {  // of 16 bits
  if (dtype == F16) {
    const float2 low = as_float2(raw.x), high = as_float2(raw.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }
  return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
                     __uint_as_float(raw.y & 0xffff0000u));
}

// The 32 inputs of a lane, in eight fours, as they lie in memory.
struct Inputs {
  uint4 fours[8];  // two words each of 16-bit dtypes

  // Zero past K, and nothing but zero if not `there`. Rows hold K rounded up to 8 inputs, on 16 bytes.
  __device__ __forceinline__ void load(const Linear& a, int k, int t, bool there) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int at = four_at(k, t, j);
      const bool in = there && at < a.K;
      fours[j] = make_uint4(0, 0, 0, 0);
      if (in && a.x_dtype == F32) fours[j] = ((const uint4*)a.x)[at / 4];
      if (in && a.x_dtype != F32) *(uint2*)&fours[j] = ((const uint2*)a.x)[at / 4];
    }
  }
  __device__ __forceinline__ void spread(float (&x)[8][4], int dtype) const {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float4 v = dtype == F32 ? *(const float4*)&fours[j] : as_float4(make_uint2(fours[j].x, fours[j].y), dtype);
      x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
    }
  }
};

// Weight and shift of a norm for the inputs of a thread, on their way into 4096 bytes that its warp has for them.
__device__ __forceinline__ void copy_norm(uint32_t to, const Fusion& by, int K, int k, int t) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int at = four_at(k, t, j);
    if (at < K) copy_few<8>(to + j * 256, (const uint16_t*)by.weight + at);
    if (at < K && by.shift) copy_few<8>(to + 2048 + j * 256, (const uint16_t*)by.shift + at);
  }
}

// What a norm makes of K numbers of which every thread has 32, 0 past K, but for the factor of an RMSNorm, which `factor_of` gives
// at the end: nobody waits for it here. `found`: of every warp how many numbers it has, their mean, their squares; those of a
// LayerNorm are of differences from the mean (Chan, Golub, LeVeque 1983).
__device__ __forceinline__ void normalize(float (&x)[8][4], const Fusion& by, int K, int k, int t, uint32_t copied, float4* found) {
  const int lane = threadIdx.x & 31;
  float count = 0.f, mean = 0.f, square = 0.f, factor = 1.f;
  if (by.centered) {
#pragma unroll
    for (int i = 0; i < 32; i++) mean += x[i / 4][i % 4], count += four_at(k, t, i / 4) < K ? 1.f : 0.f;
    count = decode::warp_sum(count), mean = decode::warp_sum(mean) / fmaxf(count, 1.f);
#pragma unroll
    for (int i = 0; i < 32; i++) {
      const float off = four_at(k, t, i / 4) < K ? x[i / 4][i % 4] - mean : 0.f;
      square += off * off;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 32; i++) square += x[i / 4][i % 4] * x[i / 4][i % 4];
  }
  square = decode::warp_sum(square);
  if (lane == 0) found[threadIdx.x / 32] = make_float4(count, mean, square, 0.f);
  if (by.centered) {
    __syncthreads();
    const float4 part = lane < BIT_WARPS ? found[lane] : make_float4(0.f, 0.f, 0.f, 0.f);
    mean = decode::warp_sum(part.x * part.y) / K;
    factor = rsqrtf(decode::warp_sum(part.z + part.x * (part.y - mean) * (part.y - mean)) / K + by.eps);
  }
  if (threadIdx.x / 32 * 8 * BLOCK_INPUTS >= K) return;  // no input of the warp is there
  uint2 weight[8], shift[8];                             // anything past K
#pragma unroll
  for (int j = 0; j < 8; j++) weight[j] = load_shared2(copied + j * 256), shift[j] = make_uint2(0, 0);
  if (by.shift) {
#pragma unroll
    for (int j = 0; j < 8; j++) shift[j] = load_shared2(copied + 2048 + j * 256);
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float4 w = as_float4(weight[j], by.dtype), b = as_float4(shift[j], by.dtype);
    const bool in = four_at(k, t, j) < K;
    x[j][0] = in ? (x[j][0] - mean) * factor * w.x + b.x : 0.f, x[j][1] = in ? (x[j][1] - mean) * factor * w.y + b.y : 0.f;
    x[j][2] = in ? (x[j][2] - mean) * factor * w.z + b.z : 0.f, x[j][3] = in ? (x[j][3] - mean) * factor * w.w + b.w : 0.f;
  }
  __syncwarp();  // what was copied has been read
}
__device__ __forceinline__ float factor_of(const Fusion& by, int K, const float4* found) {
  float square = 0.f;
#pragma unroll
  for (int w = 0; w < BIT_WARPS; w++) square += found[w].z;
  return rsqrtf(square / K + by.eps);
}

// The bits of a block of 128 inputs, of which each of four lanes t has 32, as Inputs has them, go to `own`, if they are `there`. In
// the words of lane t bit 8 c + q is input 32 w + 16 (t / 2) + 8 h + 4 (t % 2) + i, where q = 4 h + 2 (w % 2) + i % 2 and
// c = 2 (w / 2) + i / 2 (layout.cuh). Products come out 2^-SCALE times as large, and half of that if DOUBLE.
template <int SCALE, bool DOUBLE>
__device__ __forceinline__ void make_bits(const float (&x)[8][4], bool there, unsigned char* own, int t) {
  float v[8][4];  // [q][c]
  float most = 0.f;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int w = j / 2, h = j % 2, q = 4 * h + 2 * (w % 2), c = 2 * (w / 2);
    v[q][c] = x[j][0], v[q + 1][c] = x[j][1], v[q][c + 1] = x[j][2], v[q + 1][c + 1] = x[j][3];
  }
#pragma unroll
  for (int i = 0; i < 32; i++) most = larger(most, v[i / 4][i % 4]);
  most = larger(most, __shfl_xor_sync(~0u, most, 1)), most = larger(most, __shfl_xor_sync(~0u, most, 2));
  const int e = max((int)((__float_as_uint(most) + 2) >> 23) - 126, LEAST_EXPONENT);  // + 2: for what would round to 2^TOP
  const float up = power_of_two(TOP - e);
  int sum = 0;          // of m
  uint32_t bits[3][8];  // [part][i]: at first bits 8 part to 8 part + 7 of the m with q = i, each c a byte; then bit 8 part + i
#pragma unroll
  for (int q = 0; q < 8; q++) {
    uint32_t m[4];
#pragma unroll
    for (int c = 0; c < 4; c++) m[c] = __float_as_uint(fmaf(v[q][c], up, ROUND)) - __float_as_uint(ROUND), sum += m[c];
    const uint32_t low = __byte_perm(m[0], m[1], 0x5140), high = __byte_perm(m[2], m[3], 0x5140);
    bits[0][q] = __byte_perm(low, high, 0x5410), bits[1][q] = __byte_perm(low, high, 0x7632);
    bits[2][q] = __byte_perm(__byte_perm(m[0], m[1], 0x0062), __byte_perm(m[2], m[3], 0x0062), 0x5410);
  }
#pragma unroll
  for (int part = 0; part < 3; part++)
#pragma unroll
    for (int k = 1; k < 8; k *= 2) {  // transposes 8 x 8 bits in every byte
      const uint32_t mask = k == 1 ? 0x55555555u : k == 2 ? 0x33333333u : 0x0f0f0f0fu;
#pragma unroll
      for (int q = 0; q < 8; q++)
        if (!(q & k)) {
          const uint32_t low = bits[part][q], high = bits[part][q + k];
          bits[part][q] = (low & mask) | (high << k & ~mask), bits[part][q + k] = (low >> k & mask) | (high & ~mask);
        }
    }
  int high = 0;  // sum of the digits of six bits that lane 3 has
#pragma unroll
  for (int j = 18; j < 22; j++) high += __popc(bits[2][j % 8]) << (j - 18);
  high -= __popc(bits[2][6]) << 4, bits[2][7] = 0;
  sum += __shfl_xor_sync(~0u, sum, 1), high += __shfl_xor_sync(~0u, high, 1);
  sum += __shfl_xor_sync(~0u, sum, 2), high += __shfl_xor_sync(~0u, high, 2);
  if (!there) return;
  float factor = power_of_two(e - TOP + 6 * t + SCALE + DOUBLE - KEPT_SHIFT);
  if (most == 0.f) factor = 0.f;
  if (!(most < INFINITY)) factor = __uint_as_float(0x7fffffffu);
  auto bit = [&](int j) { return bits[j / 8][j % 8]; };
#pragma unroll
  for (int column = 0; column < 8; column++) {
    const int j = column / 2 * 6 + column % 2;
    ((uint4*)own)[column * 4 + t] = make_uint4(bit(j), bit(j + 2), bit(j + 4), __float_as_uint(factor));
  }
  // sum = high 2^18 + middle 2^12 + low 2^6 + the rest, each not far from the sum of the digits that a lane has
  const int below = sum - high * (1 << 18), middle = (below >> 12) - 64, rest = below - middle * (1 << 12), low = (rest >> 6) - 64;
  ((float*)own)[128 + t] = -0.5f * power_of_two(-SCALE) * (float)(t == 3 ? high : t == 2 ? middle : t == 1 ? low : rest - low * 64);
}

// The six counts of a row, with weights that make them 2^-SHIFT times as large, on top of v. sign: the weight of the fifth.
template <int SHIFT, int MORE> __device__ __forceinline__ float add_counts(const uint32_t (&c)[3][4], int row, float sign, float v) {
#pragma unroll
  for (int j = 0; j < 6; j++)
    v = fmaf(__uint_as_float(c[j / 2][2 * row + j % 2]), j == 4 ? sign * (1 << MORE) : power_of_two(149 - SHIFT + MORE + j), v);
  return v;
}

// Of a launch: how many tiles, or pairs of tiles where outputs are gated, a block has, and how many blocks have one more; units of a
// pass; 2^32 / (group / 32), rounded up.
struct Deal {
  int tiles, more, units, passes;
  unsigned per_group;
};

// What a warp has of a pass, units `begin` to `unit_end` of all tiles: `items` units, from unit `unit` of `tile` on.
struct Share {
  int items, tile, unit, unit_end;
  __device__ __forceinline__ Share(int tiles, int begin, int unit_end, int warp) : unit_end(unit_end) {
    const unsigned units = unit_end - begin, all = tiles * units, before = all * warp / BIT_WARPS;
    items = all * (warp + 1) / BIT_WARPS - before, tile = before / units, unit = begin + before - tile * units;
  }
};

// Of a pass, for whole warps that make them.
__host__ __device__ __forceinline__ int bits_bytes(int units) { return (units + 3) / 4 * 8 * BLOCK_BYTES; }

template <int BITS, int GRID, bool OFFSETS, bool MORE>
__global__ void __launch_bounds__(BIT_THREADS + SPARE_THREADS, 1) bit_gemv(const Linear a, const Shape shape, const Deal deal, const Fusion fusion) {
#if __CUDA_ARCH__ == 900  // earlier GPUs have not been measured, later ones do without binary tensor cores
  using Slot = Slot<BITS, GRID, OFFSETS>;
  constexpr int PAIRS = BITS / 2, SHIFT = 26 + (GRID == UNIFORM ? BITS : 1);  // so that no weight is above 2^127
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane >> 2, t = lane & 3;
  const int together = MORE && fusion.gated ? 2 : 1, first = together * (blockIdx.x * deal.tiles + min((int)blockIdx.x, deal.more));
  const int tiles = together * (deal.tiles + ((int)blockIdx.x < deal.more));
  const uint32_t base = shared_address(memory), ring = base + warp * Slot::RING, table = base + BIT_WARPS * Slot::RING;
  unsigned char* const x_bits = memory + BIT_WARPS * Slot::RING;
  float4* const found = (float4*)(x_bits + bits_bytes(deal.units));  // [warps], see normalize
  float* const kept = (float*)(found + BIT_WARPS);                   // [tiles][warps][16]

  auto unit_of = [&](int pass) { return min(deal.units * pass, shape.units); };  // the first of a pass
  // what is copied next: unit `next_unit` for tile first + next_tile, and how many are left of the pass
  int pass = -1, left = 0, next_tile = 0, next_unit = 0, pass_end = 0;
  uint32_t slot = ring + lane * 16;
  const int piece = lane / Slot::VECTORS;
  const unsigned char *codes, *records;
  auto go_to_tile = [&] {
    const int next = first + next_tile, tile = together > 1 ? next % 2 * (shape.tiles / 2) + next / 2 : next;
    codes = a.codes + place_of(tile, next_unit, shape.units) * Slot::CODES + lane * 16;
    records = a.records + place_of(tile, 0, shape.groups) * Slot::RECORD + (lane - piece * Slot::VECTORS) * 16;
  };
  auto push = [&] {
    while (left == 0 && pass < deal.passes - 1) {
      const Share share(tiles, unit_of(++pass), unit_of(pass + 1), warp);
      left = share.items, next_tile = share.tile, next_unit = share.unit, pass_end = share.unit_end;
      go_to_tile();
    }
    if (left) {
#pragma unroll
      for (int i = 0; i < BITS; i++) copy_async(slot + i * 512, codes + i * 512);
      const unsigned group = __umulhi(next_unit * 8 + piece * 4, deal.per_group);
      if (piece < 2) copy_async(slot + Slot::CODES, records + group * (4 * Slot::RECORD));
      left--, codes += 4 * Slot::CODES;
      if (++next_unit == pass_end) next_unit = unit_of(pass), next_tile++, go_to_tile();
      slot += Slot::BYTES;
      if (slot == ring + lane * 16 + Slot::RING) slot -= Slot::RING;
    }
    commit();
  };

  const int own_block = threadIdx.x / 4;
  const uint32_t copied = table + warp * (8 * BLOCK_BYTES) + lane * 8;
  launch_dependents();
  if (MORE && fusion.weight) {
    copy_norm(copied, fusion, a.K, own_block * BLOCK_INPUTS, t);
    commit();
  }
#pragma unroll
  for (int i = 0; i < BIT_EARLY; i++) push();
  for (int i = threadIdx.x; i < tiles * BIT_WARPS * TILE; i += BIT_THREADS) kept[i] = 0.f;
  const int pair[2] = {pair_at(BITS, r, t, 0), pair_at(BITS, r, t, 1)}, lone = lone_at(BITS, r, t, 0);
  const float sign = (t == 3 ? -1.f : 1.f) * power_of_two(149 - SHIFT + 4);
  uint32_t at = ring;
  wait_previous();
  const int outputs = tiles * TILE / together, first_output = first * TILE / together;
  float before = 0.f;  // what is added to the thread's first output

  for (int now = 0; now < deal.passes; now++) {
    const int begin = unit_of(now), end = unit_of(now + 1), blocks = 2 * (end - begin);
    if (now) __syncthreads();  // everybody is done with the bits of the pass before
    Inputs inputs;
    int block = own_block;
    inputs.load(a, (2 * begin + block) * BLOCK_INPUTS, t, block < blocks);
    if (now == 0) {
      const int n = first_output + threadIdx.x;
      if (MORE && fusion.add && threadIdx.x < outputs && n < a.N) before = ((const float*)a.y)[n];
#pragma unroll
      for (int i = BIT_EARLY; i < BIT_STAGES - 1; i++) push();  // after x, in whose way they would be
    }
    float x[8][4];
    inputs.spread(x, a.x_dtype);
    if (MORE && fusion.weight) {
      wait_copies<BIT_STAGES - 1>();  // what came before all weights
      normalize(x, fusion, a.K, block * BLOCK_INPUTS, t, copied, found);
    }
    while (true) {
      if (block - lane / 4 < blocks) make_bits<SHIFT, GRID == BCQ>(x, block < blocks, x_bits + block * BLOCK_BYTES, t);
      block += BIT_WARPS * 8;
      if (block - lane / 4 >= blocks) break;
      inputs.load(a, (2 * begin + block) * BLOCK_INPUTS, t, block < blocks);
      inputs.spread(x, a.x_dtype);
    }
    __syncthreads();
    Share share(tiles, begin, end, warp);
    float y[2] = {0.f, 0.f};
    for (; share.items; share.items--) {
      wait_copies<BIT_STAGES - 2>();
      __syncwarp();
      push();
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint32_t block = table + (2 * (share.unit - begin) + h) * BLOCK_BYTES, record = at + Slot::CODES + h * Slot::RECORD;
        const uint4 x = load_shared4(block + lane * 16);
        const float half = __uint_as_float(load_shared(block + 512 + t * 4));
        float own[2] = {0.f, 0.f};
        uint4 two;         // words of a pair of planes
        uint2 both;        // their scales
        uint32_t one = 0;  // scale of a lone plane, or step
        if (GRID == UNIFORM) one = load_shared(record + r * 4);
#pragma unroll
        for (int p = 0; p < BITS; p++) {
          uint32_t low, high;
          if (p < 2 * PAIRS) {
            if (p % 2 == 0) {
              two = load_shared4(at + pair[h] + p / 2 * (2 * ROW_BYTES));
              if (GRID == BCQ) both = load_shared2(record + p / 2 * 64 + r * 8);
            }
            low = p % 2 ? merge(two.x >> 2, two.y) : merge(two.x, two.y << 2);
            high = p % 2 ? merge(two.z >> 2, two.w) : merge(two.z, two.w << 2);
          } else {
            const uint2 words = load_shared2(at + lone + h * 64);
            low = words.x, high = words.y;
            if (GRID == BCQ) one = load_shared(record + PAIRS * 64 + r * 4);
          }
          const uint32_t a0 = __byte_perm(low, high, 0x5410), a1 = __byte_perm(low, high, 0x7632);
          uint32_t c[3][4] = {};
          count_both(c[0], a0, a1, x.x), count_both(c[1], a0, a1, x.y), count_both(c[2], a0, a1, x.z);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if (GRID == UNIFORM) {
              const int weight = plane_weight(BITS, p);
              own[i] = weight == 8   ? add_counts<SHIFT, 3>(c, i, sign, own[i])
                       : weight == 4 ? add_counts<SHIFT, 2>(c, i, sign, own[i])
                       : weight == 2 ? add_counts<SHIFT, 1>(c, i, sign, own[i])
                                     : add_counts<SHIFT, 0>(c, i, sign, own[i]);
            } else {
              const float2 s = as_float2(p == 2 * PAIRS ? one : i ? both.y : both.x);
              own[i] += (p == 2 * PAIRS ? i ? s.y : s.x : p % 2 ? s.y : s.x) * add_counts<SHIFT, 0>(c, i, sign, half);
            }
          }
        }
        if (GRID == UNIFORM) {
          const float2 step = as_float2(one);
          uint16_t zeros = 0;
          if (OFFSETS) asm volatile("ld.shared.u16 %0, [%1];" : "=h"(zeros) : "r"(record + 32 + r * 2));
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const float zero = OFFSETS ? (float)(zeros >> 8 * i & 0xff) : 0.5f * ((1 << BITS) - 1);
            own[i] = (i ? step.y : step.x) * (own[i] + 2.f * zero * half);
          }
        } else if (OFFSETS) {
          const float2 offset = as_float2(load_shared(record + BITS * 32 + r * 4));
          own[0] -= offset.x * half, own[1] -= offset.y * half;
        }
        y[0] += own[0] * __uint_as_float(x.w), y[1] += own[1] * __uint_as_float(x.w);
      }
      at += Slot::BYTES;
      if (at == ring + Slot::RING) at = ring;
      if (++share.unit == end || share.items == 1) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          y[i] += __shfl_xor_sync(~0u, y[i], 1), y[i] += __shfl_xor_sync(~0u, y[i], 2);
          if (t == 0) kept[(share.tile * BIT_WARPS + warp) * TILE + r + 8 * i] += y[i];
          y[i] = 0.f;
        }
        share.unit = begin, share.tile++;  // if there are more
      }
    }
  }
  __syncthreads();
  const float scale = power_of_two(KEPT_SHIFT) * (MORE && fusion.weight && !fusion.centered ? factor_of(fusion, a.K, found) : 1.f);
  auto output = [&](int tile, int row, int n) {  // bias and all
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < BIT_WARPS; w++) total += kept[(tile * BIT_WARPS + w) * TILE + row];
    total *= scale;
    return a.bias ? total + load_float(a.bias, n, a.bias_dtype) : total;
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs; i += BIT_THREADS) {
    const int n = first_output + i, tile = together * (i / TILE), row = i % TILE;
    if (n >= a.N) break;
    float v = output(tile, row, n);
    if (MORE && fusion.function >= 0) v = decode::apply(fusion.function, v);
    if (together > 1) v *= output(tile + 1, row, n + a.N / 2);
    if (MORE && fusion.add) v += i == threadIdx.x ? before : ((const float*)a.y)[n];
    store_float(a.y, n, a.y_dtype, v);
  }
#endif
}

template <int BITS, int GRID, bool OFFSETS> int launch_bits(const Linear& a, const Fusion& fusion, int blocks, cudaStream_t stream) {
  using Slot = Slot<BITS, GRID, OFFSETS>;
  const Shape shape(a, 1);
  const int together = fusion.gated ? 2 : 1, deals = shape.tiles / together;
  const int most = (shape.units + PASS_UNITS - 1) / PASS_UNITS, units = (shape.units + most - 1) / most;  // passes of equal length
  const Deal deal{deals / blocks, deals % blocks, units, (shape.units + units - 1) / units,
                  (unsigned)(((1ull << 32) + a.group / 32 - 1) / (a.group / 32))};
  if (a.group % BLOCK_INPUTS || (fusion.gated && a.N % (2 * TILE)) || (fusion.add && a.y_dtype != F32)) return cudaErrorInvalidValue;
  if (fusion.weight && (deal.passes > 1 || a.x_dtype != F32 || fusion.dtype == F32)) return cudaErrorInvalidValue;
  if (fusion.shift && !fusion.centered) return cudaErrorInvalidValue;  // see factor_of
  const size_t bytes = BIT_WARPS * Slot::RING + bits_bytes(units) + BIT_WARPS * sizeof(float4) +
                       together * (deal.tiles + (deal.more > 0)) * BIT_WARPS * TILE * 4;
  const bool more = fusion.weight || fusion.function >= 0 || fusion.gated || fusion.add;
  return launch_kernel(more ? bit_gemv<BITS, GRID, OFFSETS, true> : bit_gemv<BITS, GRID, OFFSETS, false>, blocks, 1, BIT_THREADS, bytes,
                       stream, a, shape, deal, fusion);
}

}  // namespace

// M = 1 and groups of multiples of 128, on GPUs of compute capability 9.0; at most as many blocks as there are tiles, or pairs of
// tiles where outputs are gated. Returns a cudaError_t.
#define LUTQ_BIT_GEMV(BITS)                                                                                                    \
  extern "C" int lutq_bit_gemv_##BITS##bit(const Linear* a, const Fusion* fusion, int blocks, cudaStream_t stream) {           \
    if (a->grid == BCQ)                                                                                                        \
      return a->offsets ? launch_bits<BITS, BCQ, true>(*a, *fusion, blocks, stream)                                            \
                        : launch_bits<BITS, BCQ, false>(*a, *fusion, blocks, stream);                                          \
    return a->offsets ? launch_bits<BITS, UNIFORM, true>(*a, *fusion, blocks, stream)                                          \
                      : launch_bits<BITS, UNIFORM, false>(*a, *fusion, blocks, stream);                                        \
  }
