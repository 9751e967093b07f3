// How a warp streams its weights: a private ring in shared memory, filled STAGES - 1 items ahead with cp.async.
//
// The warps of a block form a grid of `k_warps` x `n_warps`. In pass p, warp (kw, nw) owns span p k_warps + kw of the
// block's inputs, SPAN units, for its share of the block's tiles: their inputs stay in registers while the weights go by. An
// item is one unit of two tiles, the first an even one, so that chains of products run side by side; past the last row they
// are computed in vain. The order is pass, tile pair, unit.
#pragma once
#include "layout.cuh"

template <int SPAN> struct Place {  // of a warp in its launch
  int k_warps, kw, lane, tile_begin, tile_end, passes, span_begin;  // tiles of this warp; spans of the block
  __device__ __forceinline__ Place(const Shape& shape, int k_warps, unsigned rank, int first, int last) : k_warps(k_warps) {
    const unsigned warp = threadIdx.x >> 5, n_warps = (blockDim.x >> 5) / k_warps, nw = warp / k_warps;
    lane = threadIdx.x & 31, kw = warp - nw * k_warps;
    const unsigned pairs = (last - first) / 2;  // whole items go to each warp
    tile_begin = first + 2 * (pairs * nw / n_warps), tile_end = first + 2 * (pairs * (nw + 1) / n_warps);
    const unsigned all = (shape.units + SPAN - 1) / SPAN;
    span_begin = all * rank / shape.split;
    const int spans = all * (rank + 1) / shape.split - span_begin;
    passes = tile_begin < tile_end && kw < spans ? (spans - kw + k_warps - 1) / k_warps : 0;
  }
  __device__ __forceinline__ int unit(int pass) const { return (span_begin + pass * k_warps + kw) * SPAN; }
};

// A slot of the ring: codes of two tiles, then their records, [PIECES][2][shape.record].
template <int BITS, int H, int SPAN> struct Stream {
  static constexpr int STAGES = 4, PIECES = UNIT / H;  // a record for every H inputs
  static constexpr int CODES = BITS * PLANE_BYTES, RECORDS = PIECES * (BITS + 1) * 32;
  static constexpr int STAGE = 2 * (CODES + RECORDS), RING = STAGES * STAGE;
  static constexpr int COPIES = (2 * RECORDS / 16 + 31) / 32;  // of records; the codes take 2 BITS

  const Linear& a;
  const Shape& shape;
  const Place<SPAN>& place;
  uint32_t slot;  // shared address of the slot to fill, of this lane's first 16 bytes
  const uint32_t ring_end;
  int pass, tile, sub;
  const unsigned char *codes, *records;  // of the tile, at the pass's first unit and at group 0; codes at this lane's 16 bytes
  int from[SPAN][COPIES];                // of records, bytes from `records`; negative: nothing to copy

  __device__ __forceinline__ Stream(const Linear& a, const Shape& shape, const Place<SPAN>& place, uint32_t ring)
      : a(a), shape(shape), place(place), slot(ring + place.lane * 16), ring_end(ring + RING + place.lane * 16), pass(-1),
        tile(1 << 30), sub(SPAN - 1) {}

  __device__ __forceinline__ void go_to_tile() {
    codes = a.codes + place_of(tile, place.unit(pass), shape.units) * CODES + place.lane * 16;
    records = a.records + place_of(tile, 0, shape.groups) * shape.record;
  }

  __device__ __forceinline__ void enter_pass() {
    tile = place.tile_begin;
    go_to_tile();
    const int unit = place.unit(pass);
#pragma unroll
    for (int c = 0; c < COPIES; c++) {
      const unsigned vectors = shape.record / 8, v = place.lane + 32 * c, piece = v / vectors;  // vectors of two records
#pragma unroll
      for (int s = 0; s < SPAN; s++) {
        const unsigned g = ((unit + s) * UNIT + piece * H) / (unsigned)a.group;
        from[s][c] = piece < PIECES ? (int)(g * 4 * shape.record + (v - piece * vectors) * 16) : -1;
      }
    }
  }

  // Start the copy of the next item, or commit an empty group: wait_copies counts groups.
  __device__ __forceinline__ void push() {
    if (++sub == SPAN || place.unit(pass) + sub >= shape.units) {
      sub = 0, tile += 2;
#if __CUDA_ARCH__ >= 1000  // more instructions for fewer registers, where the compiler would spill
      if (tile < place.tile_end) go_to_tile();
#else
      codes += 2 * CODES, records += 2 * shape.record;
      if (tile % 4 == 0) {  // the next panel
        codes += (int64_t)4 * CODES * (shape.units - 1), records += (int64_t)4 * shape.record * (shape.groups - 1);
      }
#endif
      if (tile >= place.tile_end && ++pass < place.passes) enter_pass();
    }
    if (pass < place.passes) {
      const unsigned char* p = codes + sub * 4 * CODES;
#pragma unroll
      for (int c = 0; c < 2 * BITS; c++) copy_async(slot + c * 512, p + c * 512);
#pragma unroll
      for (int c = 0; c < COPIES; c++) {
        const int at = SPAN == 2 && sub ? from[SPAN - 1][c] : from[0][c];
        if (at >= 0) copy_async(slot + 2 * CODES + c * 512, records + at);
      }
      slot += STAGE;
      if (slot == ring_end) slot -= RING;
    }
    commit();
  }
};
