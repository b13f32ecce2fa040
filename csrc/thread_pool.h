// Persistent worker threads that run one function at a time, together with the calling thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lhopt {

// A hint to the processor that this thread is waiting for another one.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Waits until `done()`, briefly at full attention, then giving way to other threads.
template <class Condition>
void SpinUntil(const Condition& done) {
  constexpr int kAttentiveTurns = 2000;
  for (int turn = 0; !done(); ++turn) {
    if (turn < kAttentiveTurns) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

class ThreadPool {
 public:
  // The pool of this process. A forked child gets a fresh one, because threads do not survive a
  // fork; pools are never destroyed, so that exiting does not wait for them.
  static ThreadPool& Instance();

  ThreadPool() = default;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls `work` once on each of `num_threads` threads, the caller among them, and returns when
  // all calls have. Concurrent callers take turns. `work` must not throw nor call Run.
  void Run(int num_threads, const std::function<void()>& work);

 private:
  struct Worker;

  void AddWorker();
  void WorkerLoop(Worker& worker);

  std::mutex turn_;  // held by the caller whose work is running
  std::vector<std::unique_ptr<Worker>> workers_;
  const std::function<void()>* work_ = nullptr;
  std::atomic<int> running_{0};  // workers that have not finished `work_`
};

}  // namespace lhopt
