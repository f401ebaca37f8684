// Every access to global memory goes through these functions. They are predicated: the lanes of a warp do
// not diverge, and a thread can issue several loads before it uses the first.
#pragma once

using i64 = long long;

template <typename T, int V> struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// The machine word of a pack's size, which one instruction loads or stores.
template <int BYTES> struct Word;
template <> struct Word<1> { using type = unsigned char; };
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <typename T> __device__ __forceinline__ T load_if(bool active, const T* address) {
  T value{};
  if (active) value = *address;
  return value;
}

template <typename T> __device__ __forceinline__ void store_if(bool active, T* address, T value) {
  if (active) *address = value;
}

// Hides the origin of an address from the compiler.
template <typename T> __device__ __forceinline__ T* opaque(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

// Keeps a value in a register: otherwise the compiler recomputes it in every iteration of a loop.
__device__ __forceinline__ void keep_ready(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void keep_ready(i64& value) { asm volatile("" : "+l"(value)); }

// The address of element i of an array that may be null. The compiler must not see that the null test
// gives the same in all iterations of a loop: it would make one copy of the loop for each case.
template <typename T> __device__ __forceinline__ T* element(T* array, i64 i) {
  array = opaque(array);
  return array ? array + i : nullptr;
}

template <typename T>
__device__ __forceinline__ T load_or(bool active, const T* array, i64 i, T otherwise) {
  const T* address = element(array, i);
  T value = load_if(active && address, address);
  return address ? value : otherwise;
}

template <typename T>
__device__ __forceinline__ void store_at(bool active, T* array, i64 i, T value) {
  T* address = element(array, i);
  store_if(active && address, address, value);
}

template <typename W> __device__ __forceinline__ void store_word(W* address, const W& word) {
  *address = word;
}

// In PTX, because the compiler splits this store into four where narrower ones follow it.
__device__ __forceinline__ void store_word(uint4* address, const uint4& word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}

// The address must be a multiple of the pack's size. What is not active is zeros, or anything.
template <int V, bool ZEROS = true, typename T>
__device__ __forceinline__ Pack<T, V> load_pack_if(bool active, const T* address) {
  using word = typename Word<sizeof(T) * V>::type;
  word bits;
  if (ZEROS) bits = word{};
  if (active) bits = *reinterpret_cast<const word*>(address);
  Pack<T, V> pack;
  memcpy(&pack, &bits, sizeof(word));
  return pack;
}

// Gathers elements under one branch: a branch for each takes long to compile.
template <int V, typename T, typename At>
__device__ __forceinline__ Pack<T, V> gather_if(bool active, const T* address, At at) {
  Pack<T, V> pack{};
  if (active) {
#pragma unroll
    for (int j = 0; j < V; ++j) pack.v[j] = address[at(j)];
  }
  return pack;
}

// Bypasses L1, which does not see what other blocks of this launch wrote. The registers are zeroed before
// the load: a select after it would wait for the load, and hold up the next one.
__device__ __forceinline__ Pack<double, 2> load_pair_of_blocks_if(bool active, const double* address) {
  Pack<double, 2> pair{};
  asm volatile("{\n.reg .pred active;\nsetp.ne.s32 active, %3, 0;\n"
               "@active ld.global.cg.v2.f64 {%0, %1}, [%2];\n}"
               : "+d"(pair.v[0]), "+d"(pair.v[1])
               : "l"(__cvta_generic_to_global(address)), "r"(static_cast<int>(active))
               : "memory");
  return pair;
}

template <int V, typename T>
__device__ __forceinline__ void store_pack_if(bool active, T* address, const Pack<T, V>& pack) {
  using word = typename Word<sizeof(T) * V>::type;
  word bits;
  memcpy(&bits, &pack, sizeof(word));
  if (active) store_word(reinterpret_cast<word*>(address), bits);
}
