// Every access to global memory goes through these helpers: predicated, so that each lane of a warp
// calls them equally often, which lets the host build count bytes, widths and sectors.
#pragma once

using i64 = long long;

template <typename T, int V> struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// The widest machine word with the size of a pack: one instruction each.
template <int BYTES> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

__device__ __forceinline__ void count_access(const void* address, int bytes, bool store,
                                             bool active) {
#ifdef CUPYBN_HOST
  cupybn_host_access(address, bytes, store, active);
#endif
}

template <typename T> __device__ __forceinline__ T load_if(bool active, const T* address) {
  count_access(address, sizeof(T), false, active);
  T value{};
  if (active) value = *address;
  return value;
}

template <typename T> __device__ __forceinline__ void store_if(bool active, T* address, T value) {
  count_access(address, sizeof(T), true, active);
  if (active) *address = value;
}

// An address of which the compiler knows nothing.
template <typename T> __device__ __forceinline__ T* opaque(T* address) {
#ifndef CUPYBN_HOST
  asm volatile("" : "+l"(address));
#endif
  return address;
}

// Element i of an array that may be null. The compiler must not see that it is null in all rounds of a
// loop or in none: it would make a copy of the loop for each.
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

#ifndef CUPYBN_HOST
// Left to itself, the compiler makes four stores of this one where narrower ones follow it.
__device__ __forceinline__ void store_word(uint4* address, const uint4& word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
#endif

// The address must be a multiple of the pack's size.
template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack_if(bool active, const T* address) {
  using word = typename Word<sizeof(T) * V>::type;
  count_access(address, sizeof(word), false, active);
  word bits{};
#ifdef CUPYBN_HOST
  if (active) memcpy(&bits, __builtin_assume_aligned(address, sizeof(word)), sizeof(word));
#else
  if (active) bits = *reinterpret_cast<const word*>(address);
#endif
  Pack<T, V> pack;
  memcpy(&pack, &bits, sizeof(word));
  return pack;
}

// Past the first-level cache, which does not see what other blocks of this launch wrote. Into zeros: a
// value chosen behind the load would wait for it, and the next load with it.
__device__ __forceinline__ Pack<double, 2> load_pair_of_blocks_if(bool active, const double* address) {
#ifdef CUPYBN_HOST
  return load_pack_if<2>(active, address);
#else
  Pack<double, 2> pair{};
  asm volatile("{\n.reg .pred active;\nsetp.ne.s32 active, %3, 0;\n"
               "@active ld.global.cg.v2.f64 {%0, %1}, [%2];\n}"
               : "+d"(pair.v[0]), "+d"(pair.v[1])
               : "l"(__cvta_generic_to_global(address)), "r"(static_cast<int>(active))
               : "memory");
  return pair;
#endif
}

template <int V, typename T>
__device__ __forceinline__ void store_pack_if(bool active, T* address, const Pack<T, V>& pack) {
  using word = typename Word<sizeof(T) * V>::type;
  count_access(address, sizeof(word), true, active);
  word bits;
  memcpy(&bits, &pack, sizeof(word));
#ifdef CUPYBN_HOST
  if (active) memcpy(__builtin_assume_aligned(address, sizeof(word)), &bits, sizeof(word));
#else
  if (active) store_word(reinterpret_cast<word*>(address), bits);
#endif
}
