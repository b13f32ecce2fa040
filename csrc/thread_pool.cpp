#include "thread_pool.h"

#include <unistd.h>

#include <utility>

namespace lhopt {

// A worker sleeps until its generation advances.
struct ThreadPool::Worker {
  std::atomic<uint64_t> generation{0};
  std::mutex mutex;
  std::condition_variable wake;
  bool asleep = false;  // guarded by mutex
};

ThreadPool& ThreadPool::Instance() {
  static std::mutex mutex;
  static std::atomic<ThreadPool*> pool{nullptr};
  static std::atomic<pid_t> owner{0};
  if (owner.load(std::memory_order_acquire) != getpid()) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (owner.load(std::memory_order_relaxed) != getpid()) {
      pool.store(new ThreadPool, std::memory_order_relaxed);
      owner.store(getpid(), std::memory_order_release);
    }
  }
  return *pool.load(std::memory_order_relaxed);
}

void ThreadPool::Run(int num_threads, const std::function<void()>& work) {
  if (num_threads <= 1) return work();
  const std::lock_guard<std::mutex> lock(turn_);
  const size_t needed = static_cast<size_t>(num_threads) - 1;
  while (workers_.size() < needed) AddWorker();

  work_ = &work;
  running_.store(static_cast<int>(needed), std::memory_order_relaxed);
  for (size_t i = 0; i < needed; ++i) {
    Worker& worker = *workers_[i];
    worker.generation.fetch_add(1, std::memory_order_release);
    const std::lock_guard<std::mutex> sleep(worker.mutex);
    if (worker.asleep) worker.wake.notify_one();
  }
  work();
  SpinUntil([this] { return running_.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::AddWorker() {
  auto worker = std::make_unique<Worker>();
  std::thread([this, &state = *worker] { WorkerLoop(state); }).detach();
  workers_.push_back(std::move(worker));
}

void ThreadPool::WorkerLoop(Worker& worker) {
  constexpr int kAttentiveTurns = 4000;  // tens of microseconds: the next step is rarely closer
  for (uint64_t seen = 0;;) {
    const auto called = [&] { return worker.generation.load(std::memory_order_acquire) != seen; };
    for (int turn = 0; turn < kAttentiveTurns && !called(); ++turn) Pause();
    if (!called()) {
      std::unique_lock<std::mutex> lock(worker.mutex);
      worker.asleep = true;
      worker.wake.wait(lock, called);
      worker.asleep = false;
    }
    ++seen;
    (*work_)();
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace lhopt
