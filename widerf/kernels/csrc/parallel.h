// Scratch memory and threads.
#pragma once
#include "vectors.h"
#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

// Memory for the length of a scope, aligned to cache lines; `data` is null if there was none.
template <class T>
struct Scratch {
  void *raw;
  T *data;
  explicit Scratch(int64_t count) : raw(malloc((size_t)count * sizeof(T) + 64)), data(nullptr) {
    if (raw) data = (T *)(((uintptr_t)raw + 63) & ~(uintptr_t)63);
  }
  ~Scratch() { free(raw); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
};

// Calls f(thread, begin, end) on `threads` equal shares of 0 … tasks − 1.
template <class F>
struct Share {
  const F *f;
  int64_t thread, begin, end;
  static void *run(void *p) {
    const Share *s = (const Share *)p;
    (*s->f)(s->thread, s->begin, s->end);
    return nullptr;
  }
};

constexpr int64_t MOST_THREADS = 256;

template <class F>
void parallel(int64_t tasks, int64_t threads, const F &f) {
  threads = least(least(threads, tasks), MOST_THREADS);
  if (threads <= 1) {
    if (tasks > 0) f(0, 0, tasks);
    return;
  }
#ifdef _WIN32
  for (int64_t i = 0; i < threads; i++) f(i, tasks * i / threads, tasks * (i + 1) / threads);
#else
  Share<F> share[MOST_THREADS];
  pthread_t handle[MOST_THREADS];
  bool started[MOST_THREADS];
  for (int64_t i = 0; i < threads; i++) share[i] = {&f, i, tasks * i / threads, tasks * (i + 1) / threads};
  for (int64_t i = 1; i < threads; i++) started[i] = pthread_create(&handle[i], nullptr, Share<F>::run, &share[i]) == 0;
  Share<F>::run(&share[0]);
  for (int64_t i = 1; i < threads; i++) {
    if (started[i])
      pthread_join(handle[i], nullptr);
    else
      Share<F>::run(&share[i]);
  }
#endif
}

// Starting a thread takes about as long as a hundred thousand multiplications.
inline int64_t useful_threads(const double multiplications, int64_t threads) {
  const double limit = multiplications / 4e5;
  return most(1, least(least(threads, MOST_THREADS), limit < 1e6 ? (int64_t)limit : threads));
}

}  // namespace
