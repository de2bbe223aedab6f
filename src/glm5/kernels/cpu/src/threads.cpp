#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace glm5 {
namespace {

// A job follows the last one within microseconds while a model runs, and a little more where Python stands
// between: worth waiting for awake. After that a thread sleeps, so that an idle process costs nothing.
constexpr auto kAwake = std::chrono::microseconds(150);
constexpr int kPatient = 2000;  // pauses, before the processor is offered to somebody else

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; i++) threads_.emplace_back([this] { live(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int workers() const { return static_cast<int>(threads_.size()); }

  // Does not wait for a thread that has not come: on a busy machine it may be long away, and what it would have
  // done is done by those who are here.
  void run(int items, Job job, void* context) {
    job_ = job, context_ = context, items_ = items;
    next_.store(0, std::memory_order_relaxed);
    uint64_t mine;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      mine = epoch_.fetch_add(1) + 1;
      open_.store(mine);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    work();
    open_.store(0);  // who comes now goes again; who came before this is waited for
    for (int turn = 0; inside_.load() > 0; turn++) turn < kPatient ? pause() : std::this_thread::yield();
  }

 private:
  void work() {
    for (int item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) job_(context_, item);
  }

  void live() {
    uint64_t seen = 0;
    for (;;) {
      seen = next_epoch(seen);
      if (ending_) return;
      // First in, then a look whether the job is still there: its owner closes it, then looks who is in.
      inside_.fetch_add(1);
      if (open_.load() == seen) work();
      inside_.fetch_sub(1);
    }
  }

  uint64_t next_epoch(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    for (int turn = 0;; turn++) {
      const uint64_t now = epoch_.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
      if (turn % 16 == 15 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
    sleeping_.fetch_sub(1);
    return epoch_.load(std::memory_order_acquire);
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0}, open_{0};  // of the last job; of the one that is being worked on
  std::atomic<int> next_{0}, inside_{0}, sleeping_{0};
  bool ending_ = false;
  Job job_ = nullptr;
  void* context_ = nullptr;
  int items_ = 0;
};

std::mutex owner;  // held by the one caller that uses the pool
std::unique_ptr<Pool> pool;
int wanted = 0;
thread_local bool inside = false;

#if defined(__unix__) || defined(__APPLE__)
// A forked child has none of the threads: joining them would wait for ever, and so would a lock that another
// thread of the parent held.
struct AtFork {
  AtFork() {
    pthread_atfork(nullptr, nullptr, [] {
      new (&owner) std::mutex;
      (void)pool.release();
      inside = false;
    });
  }
} at_fork;
#endif

int default_threads() {
  const unsigned cores = std::thread::hardware_concurrency();
  return cores ? static_cast<int>(cores) : 1;
}

}  // namespace

void set_threads(int count) {
  std::lock_guard<std::mutex> lock(owner);
  wanted = count < 1 ? 1 : count;
  if (pool && pool->workers() != wanted - 1) pool.reset();
}

int threads() { return wanted ? wanted : default_threads(); }

void parallel(int items, Job job, void* context) {
  if (items > 1 && threads() > 1 && !inside && owner.try_lock()) {
    std::lock_guard<std::mutex> lock(owner, std::adopt_lock);
    inside = true;
    if (!pool) pool = std::make_unique<Pool>(threads() - 1);
    pool->run(items, job, context);
    inside = false;
    return;
  }
  for (int item = 0; item < items; item++) job(context, item);
}

}  // namespace glm5
