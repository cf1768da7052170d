// What every kernel template shares: loads that bypass L1, tensor-core products, unpacking of weights.

#include <cuda_fp16.h>

namespace tb {

using u32 = unsigned int;

template <int N> struct alignas(2 * N) Halves { __half v[N]; };

// 16 bytes that are read once: not kept in L1.
__device__ __forceinline__ uint4 stream(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ __half constant(const __half* p) {
  unsigned short v;
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return __ushort_as_half(v);
}

// A kernel may be launched before the one ahead of it has ended (programmatic dependent launch). `begin` lets the next
// one come and waits for the last: what that one wrote must be read after it, by the functions below, which the
// compiler leaves where they are.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ uint4 fresh(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint4 fresh_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u32 fresh_word(const void* p) {
  u32 v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ __half fresh_half(const __half* p) {
  unsigned short v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return __ushort_as_half(v);
}

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes into shared memory, in the background: done after `commit` and `await<0>`.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::
               "r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void await() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// d[16, 8] += a[16, 16] b[16, 8]; lane (g, c) = (lane / 4, lane % 4) holds of a: (g, 2c), (g + 8, 2c), (g, 2c + 8),
// (g + 8, 2c + 8), of b: (2c, g), (2c + 8, g), two along k each; of d: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1).
__device__ __forceinline__ void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 bits(__half2 v) { return *reinterpret_cast<u32*>(&v); }
__device__ __forceinline__ __half2 halves(u32 v) { return *reinterpret_cast<__half2*>(&v); }

// (v & mask) | magic in one instruction.
template <u32 MASK, u32 MAGIC>
__device__ __forceinline__ u32 mask_or(u32 v) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(v), "n"(MASK), "n"(MAGIC));
  return r;
}

// What the integers of a group mean: (q - ZERO) s for a ZERO from 0 on, (q - z) s with a whole z of the group, q s + minimum.
constexpr int OWN_ZERO = -1, MINIMUM = -2;
__device__ constexpr int middle(int bits) { return (1 << (bits - 1)) - 1; }

// -(ONE + zero), where ONE is what an integer's place in a half adds to it. `offset`: a group's zero, or its minimum.
template <int ONE, int ZERO> __device__ __forceinline__ __half2 lowered(__half2 offset) {
  if constexpr (ZERO == OWN_ZERO) return __hsub2(__float2half2_rn(-static_cast<float>(ONE)), offset);
  return __float2half2_rn(-static_cast<float>(ONE + (ZERO == MINIMUM ? 0 : ZERO)));
}

// One word of BITS-bit weights less their zero -> halves, in the pairs that the word offers without moving bits around:
// 4 bits: (0, 4), (1, 5), (2, 6), (3, 7); 8 bits: (0, 1), (2, 3); 16 bits: the word itself. Exact.
template <int BITS> struct Word;

template <> struct Word<4> {
  static constexpr int PAIRS = 4;
  template <int ZERO> static __device__ __forceinline__ void unpack(u32 w, u32* h, __half2 offset) {
    const __half2 sixteenth = __float2half2_rn(0.0625f);
    const __half2 low = lowered<1024, ZERO>(offset), high = lowered<64, ZERO>(offset);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // as halves, 0x6400 | n is 1024 + n, and 0x6400 | 16 n is 1024 + 16 n
      h[2 * i] = bits(__hadd2(halves(mask_or<0x000f000fu, 0x64006400u>(w)), low));
      h[2 * i + 1] = bits(__hfma2(halves(mask_or<0x00f000f0u, 0x64006400u>(w)), sixteenth, high));
      w >>= 8;
    }
  }
  // The activations of the word's weights, 8 halves in order -> the same pairs.
  static __device__ __forceinline__ void pair(uint4 x, u32* p) {
    p[0] = __byte_perm(x.x, x.z, 0x5410);
    p[1] = __byte_perm(x.x, x.z, 0x7632);
    p[2] = __byte_perm(x.y, x.w, 0x5410);
    p[3] = __byte_perm(x.y, x.w, 0x7632);
  }
};

template <> struct Word<8> {
  static constexpr int PAIRS = 2;
  template <int ZERO> static __device__ __forceinline__ void unpack(u32 w, u32* h, __half2 offset) {
    const __half2 low = lowered<1024, ZERO>(offset);
    h[0] = bits(__hadd2(halves(__byte_perm(w, 0x64646464u, 0x4140)), low));
    h[1] = bits(__hadd2(halves(__byte_perm(w, 0x64646464u, 0x4342)), low));
  }
};

template <> struct Word<16> {
  static constexpr int PAIRS = 1;
  template <int ZERO> static __device__ __forceinline__ void unpack(u32 w, u32* h, __half2 offset) { h[0] = w; }
};

// An integer less its zero, times its group's scale; or times that, plus the group's minimum.
template <int ZERO> __device__ __forceinline__ u32 scaled(u32 h, __half2 scale, __half2 offset) {
  return bits(ZERO == MINIMUM ? __hfma2(halves(h), scale, offset) : __hmul2(halves(h), scale));
}

// Eight halves as floats.
__device__ __forceinline__ void floats(uint4 v, float* f) {
  const u32* w = &v.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __half22float2(halves(w[i]));
    f[2 * i] = two.x;
    f[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half_rn(v); }

}  // namespace tb
