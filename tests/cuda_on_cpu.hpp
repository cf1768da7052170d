// CUDA's threads on a CPU: a block is an operating system's thread, its threads are fibers that take turns where they
// wait for each other. What kernels say in assembly is said here in C++.

#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <thread>
#include <vector>

#include <cuda_fp16.h>

#undef __shared__
#undef __device__
#undef __forceinline__
#undef __align__
#define __shared__ static thread_local
#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))

struct Three { unsigned x, y, z; };
static thread_local Three threadIdx, blockIdx;
static Three gridDim;

struct Fiber {
  ucontext_t context;
  Three place;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool done = false;
};
struct Waiting { int arrived = 0, turn = 0; };

static thread_local std::vector<Fiber>* fibers;
static thread_local Fiber* running;
static thread_local ucontext_t scheduler;
static thread_local std::map<unsigned, Waiting> waiting;  // by the first thread and the number of those that wait
static thread_local unsigned (*slots)[32][8];             // of a warp's lanes
static thread_local char tls_base;
static std::vector<char*> bases;
static std::atomic<int> in_cluster{0}, cluster_turn{0};
static int cluster_threads, cluster_blocks;

inline void take_turns() {
  swapcontext(&running->context, &scheduler);
  threadIdx = running->place;
}

// Until `count` threads, of which `first` is the first, have come here.
inline void wait_for(int first, int count) {
  Waiting& one = waiting[first * 2048 + count];
  const int turn = one.turn;
  if (++one.arrived == count) one.arrived = 0, ++one.turn;
  while (one.turn == turn) take_turns();
}

inline void __syncthreads() { wait_for(0, fibers->size()); }
inline void __syncwarp() { wait_for(threadIdx.x / 32 * 32, 32); }

inline float __shfl_xor_sync(unsigned mask, float v, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = warp * 32 + __builtin_ctz(mask), count = __builtin_popcount(mask);
  wait_for(first, count);
  std::memcpy(slots[warp][lane], &v, 4);
  wait_for(first, count);
  std::memcpy(&v, slots[warp][lane ^ step], 4);
  wait_for(first, count);
  return v;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = a | static_cast<unsigned long long>(b) << 32;
  unsigned v = 0;
  for (int i = 0; i < 4; ++i) v |= (both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return v;
}
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline __half2 fused(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
#define __hfma2 fused
template <typename A, typename B> int min(A a, B b) { return a < b ? a : b; }
template <typename A, typename B> int max(A a, B b) { return a > b ? a : b; }

namespace tb {
using u32 = unsigned;
using u64 = unsigned long long;

template <typename T> T read_as(const void* p) { T v; std::memcpy(&v, p, sizeof v); return v; }
inline uint4 stream(const void* p) { return read_as<uint4>(p); }
inline uint4 fresh(const void* p) { return read_as<uint4>(p); }
inline uint4 fresh_stream(const void* p) { return read_as<uint4>(p); }
inline u32 fresh_word(const void* p) { return read_as<u32>(p); }
inline __half fresh_half(const __half* p) { return *p; }
inline __half constant(const __half* p) { return *p; }
inline void begin() {}
inline void copy_async(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void commit() {}
template <int N> void await() {}
template <u32 MASK, u32 MAGIC> u32 mask_or(u32 v) { return (v & MASK) | MAGIC; }

inline float2 two(u32 v) { return __half22float2(*reinterpret_cast<__half2*>(&v)); }

inline void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 given[6] = {a0, a1, a2, a3, b0, b1};
  __syncwarp();
  std::memcpy(slots[warp][lane], given, sizeof given);
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    for (int q = 0; q < 4; ++q)
      for (int h = 0; h < 2; ++h) {
        const float2 a = two(slots[warp][lane / 4 * 4 + q][i / 2 + 2 * h]);
        const float2 b = two(slots[warp][(lane % 4 * 2 + i % 2) * 4 + q][4 + h]);
        d[i] += a.x * b.x + a.y * b.y;
      }
  __syncwarp();
}

template <bool TRANSPOSED> void load_matrices(u32* r, const void* from) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncwarp();
  std::memcpy(slots[warp][lane], &from, sizeof from);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    unsigned short pair[2];
    for (int j = 0; j < 2; ++j) {
      const int row = TRANSPOSED ? lane % 4 * 2 + j : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + j;
      pair[j] = read_as<const unsigned short*>(slots[warp][8 * i + row])[column];
    }
    std::memcpy(&r[i], pair, 4);
  }
  __syncwarp();
}

inline void cluster_sync() {
  const int turn = cluster_turn;
  if (++in_cluster == cluster_threads) in_cluster = 0, ++cluster_turn;
  while (cluster_turn == turn) {
    take_turns();
    std::this_thread::yield();
  }
}
inline float remote(const float* p, int rank) {
  return read_as<float>(bases[rank] + (reinterpret_cast<const char*>(p) - &tls_base));
}
}  // namespace tb

static const std::function<void()>* work;

inline void begin_fiber() {
  threadIdx = running->place;
  (*work)();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

inline void run_block(Three block, int threads) {
  std::vector<Fiber> own(threads);
  std::vector<unsigned> memory(threads / 32 * 256);
  fibers = &own, blockIdx = block, slots = reinterpret_cast<unsigned (*)[32][8]>(memory.data());
  waiting.clear();
  for (int i = 0; i < threads; ++i) {
    getcontext(&own[i].context);
    own[i].place = {static_cast<unsigned>(i), 0, 0};
    own[i].context.uc_stack.ss_sp = own[i].stack.data();
    own[i].context.uc_stack.ss_size = own[i].stack.size();
    makecontext(&own[i].context, begin_fiber, 0);
  }
  for (bool all = false; !all;) {
    all = true;
    for (Fiber& each : own) {
      if (each.done) continue;
      all = false, running = &each;
      swapcontext(&scheduler, &each.context);
    }
  }
}

// Blocks of a grid, those of a cluster at once.
inline void run_grid(unsigned x, unsigned y, unsigned cluster, int threads, const std::function<void()>& given) {
  gridDim = {x, y, 1}, work = &given, cluster_threads = cluster * threads, cluster_blocks = cluster;
  bases.assign(cluster, nullptr);
  for (unsigned first = 0; first < x * y; first += cluster) {
    std::atomic<unsigned> ready{0};
    std::vector<std::thread> blocks;
    for (unsigned i = 0; i < cluster; ++i)
      blocks.emplace_back([&, i] {
        bases[i] = &tls_base, ++ready;
        while (ready < cluster) std::this_thread::yield();
        run_block({(first + i) % x, (first + i) / x, 0}, threads);
      });
    for (std::thread& each : blocks) each.join();
  }
}
