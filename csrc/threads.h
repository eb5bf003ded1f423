/* threads.h - the only door to threads. */
#ifndef BNBQ_THREADS_H
#define BNBQ_THREADS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One task; returns false when it ran out of memory. */
typedef bool bnbq_task(void *context, int64_t task);

/* Run task 0..tasks-1, each exactly once, in any order and on any thread; returns when all are
 * done, false if any of them returned false. Which thread runs which task is decided at run time,
 * so a task's result must not depend on it. Uses the process's own libgomp when that is the one
 * OpenMP runtime loaded (so PyTorch's pool and its thread count), else a small pool of its own.
 * Serial inside a parallel region, in a forked child, and when tasks < 2. */
bool bnbq_parallel_for(bnbq_task *run, void *context, int64_t tasks);

/* The same on the calling thread alone: for work too small to wake another one. Both run the tasks
 * in the default floating-point environment, whatever the host set (flush to zero, rounding). */
bool bnbq_serial_for(bnbq_task *run, void *context, int64_t tasks);

/* Threads that the next call from this thread would use. */
int bnbq_thread_count(void);
/* 0: follow the host (default). Otherwise at most this many, for the whole process. */
void bnbq_set_thread_limit(int threads);
/* "libgomp", "own pool" or "serial (forked child)": what the next call would use. */
const char *bnbq_thread_backend(void);

/* Scratch memory of the calling thread, 64-byte aligned, kept between calls and freed with the
 * thread. Each slot is one buffer that only grows; its content is undefined. NULL: no memory. */
enum {
    /* Written by the thread that called the front, read by every worker. */
    BNBQ_SCRATCH_X,       /* packed activations, or gradients as f32 */
    BNBQ_SCRATCH_EXTRA,   /* scales of a whole weight, sums of scales, or lists of outliers */
    BNBQ_SCRATCH_COLUMNS, /* linear_s8.c: which columns are outliers */
    /* Of each worker, within one task. */
    BNBQ_SCRATCH_ROW,    /* rows converted to f32 */
    BNBQ_SCRATCH_TILE,   /* the output tile */
    BNBQ_SCRATCH_KERNEL, /* handed to kernels as `scratch` */
    BNBQ_SCRATCH_ABSMAX, /* scales of a tile; in linear_s8.c, of the rows of x, for every worker */
    BNBQ_SCRATCH_SLOTS
};
void *bnbq_scratch(int slot, size_t bytes);

#endif
