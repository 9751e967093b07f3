// A sum over GPUs inside a kernel: each writes its numbers into an inbox of every other one, through pointers to its memory
// (NVLink), in the manner of NCCL's LL protocol. Every 8 bytes are a number and a flag, written and read at once: when the flag
// is right, the number is there. Nothing else has to be waited for, no fence is needed, and a sum takes one way over the link.
//
// The sums of a decode step are its turns 0, 1, ..., the same on every rank, and `step` counts steps, by a kernel at the
// beginning of each. An inbox has two halves, for even and for odd turns, with a slot in each for every sender, its owner among
// them: [2][world][most numbers]{number, flag}. All add up in the order of the senders, so all ranks have the same bits.
//
// Nothing is overwritten before it is read. A rank sends turn t + 2 after its kernel of turn t + 1 has ended (wait_previous;
// every kernel between them has waited for the one ahead, too). That kernel has had the numbers of turn t + 1 of every rank, and
// each rank sends those after its own kernel of turn t has ended, which has read all that was there of turn t. A step has an even
// number of turns, so this holds from step to step as well, also where another engine with other sizes takes the next one: slots
// stay where they are. What lies in a slot until then has the flag of an earlier turn, or 0; flags come again after 2^22 steps.
//
// No rank waits in vain. All blocks of a launch run at once (lutq/decode/steps.py sees to it) and a thread sends all it has
// before it waits. So a rank in turn t has sent it, and needs of the others that they come to turn t, which takes earlier turns
// only. There is no time limit, as there is none in NCCL: when a process ends, lutq/parallel/watch.py ends the others.
#pragma once
#include <stdint.h>

constexpr int MOST_RANKS = 8, TURN_BITS = 10;

struct Inboxes {
  void* inbox[MOST_RANKS];  // of each rank, as this process has it
  const uint32_t* step;     // of this rank
  int rank, world, turn, most;  // world 0 or 1: nothing to add up; most: numbers of a slot
};

// Volatile: written and read where it is, past L1.
__device__ __forceinline__ void store_volatile(void* p, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ uint4 load_volatile(const void* p) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// What marks the numbers of this turn. Of kernels that have waited for the one ahead.
__device__ __forceinline__ uint32_t flag_of(const Inboxes& a) {
  uint32_t step;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(step) : "l"(a.step) : "memory");
  return step << TURN_BITS | a.turn;
}

// Where `to` finds the first 2 numbers, 16 bytes, of a vector of `sender`. The others are `vectors` times 16 bytes apart, so that
// what neighbouring threads write and read at once lies side by side.
__device__ __forceinline__ unsigned char* slot_of(const Inboxes& a, int to, int sender, int vector) {
  return (unsigned char*)a.inbox[to] + ((int64_t)((a.turn & 1) * a.world + sender) * a.most + 2 * vector) * 8;
}

// Give every rank this one's 8 numbers of vector `vector` of `vectors`.
__device__ __forceinline__ void send(const Inboxes& a, uint32_t flag, int vector, int vectors, const float (&v)[8]) {
  for (int i = 1; i <= a.world; i++) {  // itself last, and not all of them the same one first
    const int to = a.rank + i - (a.rank + i < a.world ? 0 : a.world);
    unsigned char* p = slot_of(a, to, a.rank, vector);
#pragma unroll
    for (int j = 0; j < 4; j++)
      store_volatile(p + (int64_t)j * vectors * 16, __float_as_uint(v[2 * j]), flag, __float_as_uint(v[2 * j + 1]), flag);
  }
}

// v = the sum of what all ranks give, when it is there. GROUP of them are looked for at once, for which a kernel needs registers.
template <int GROUP>
__device__ __forceinline__ void receive(const Inboxes& a, uint32_t flag, int vector, int vectors, float (&v)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = 0.f;
  for (int begin = 0; begin < a.world; begin += GROUP) {
    uint4 found[GROUP][4];
    bool missing[GROUP], any;
#pragma unroll
    for (int g = 0; g < GROUP; g++) missing[g] = begin + g < a.world;
    do {
#pragma unroll
      for (int g = 0; g < GROUP; g++)
        if (missing[g]) {
          const unsigned char* p = slot_of(a, a.rank, begin + g, vector);
#pragma unroll
          for (int i = 0; i < 4; i++) found[g][i] = load_volatile(p + (int64_t)i * vectors * 16);
        }
      any = false;
#pragma unroll
      for (int g = 0; g < GROUP; g++)
        if (missing[g]) {
          missing[g] = false;
#pragma unroll
          for (int i = 0; i < 4; i++) missing[g] |= found[g][i].y != flag || found[g][i].w != flag;
          any |= missing[g];
        }
    } while (any);
#pragma unroll
    for (int g = 0; g < GROUP; g++)
      if (begin + g < a.world)
#pragma unroll
        for (int i = 0; i < 4; i++) v[2 * i] += __uint_as_float(found[g][i].x), v[2 * i + 1] += __uint_as_float(found[g][i].z);
  }
}
