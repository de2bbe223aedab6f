// A pool of threads that share the items of one job at a time and sleep between jobs.
#pragma once

namespace glm5 {

using Job = void (*)(void* context, int item);

// Calls job(context, 0 .. items-1), each once, on the caller and the pool; returns when all are
// done. Results must not depend on which thread takes an item. Not reentrant: a job that calls it
// again, or a second caller at the same time, works alone.
void parallel(int items, Job job, void* context);

template <class F>
void parallel(int items, F&& body) {
  parallel(items, [](void* context, int item) { (*static_cast<F*>(context))(item); }, &body);
}

void set_threads(int count);  // including the caller
int threads();

}  // namespace glm5
