/* The threads of the CPU's kernels. Used by all of them.

A decode step is hundreds of tasks of microseconds, and the cores are shared: with the server's other processes, and
with strangers. So a call hands out small tasks one by one, and never waits for a thread that has not come: where a
core is taken, the others do its part. Threads that find nothing watch for SPIN cycles, giving way to whoever wants the
core, then sleep. Where two threads call at once, as embedded engines do, the second works alone.
*/
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu_kernels.h"

#define SPIN 200000 /* cycles, below 0.1 ms: more than lies between two operations of a forward */
#define PAUSES 32   /* between two looks at whether somebody else wants the core */
#define MOST_THREADS 256
#define LEFT 20 /* bits of a ticket: tasks not yet taken */

/* The call that goes on, unchanged until its last task is done. */
static void (*current_task)(void *, long);
static void *current_data;
/* Number of the call, threads that may take part, tasks that are left: in one word, so that nobody takes a task of a
call that he has not seen. */
static _Atomic uint64_t ticket;
static _Atomic long done;
static _Atomic int sequence, sleepers; /* `sequence` changes with each call */
static atomic_flag busy = ATOMIC_FLAG_INIT;
static int started = 1; /* threads that there are, the caller one of them */

/* Take a task of the current call as its thread number `thread`; -1: there is none. */
static long claim(uint64_t thread) {
    uint64_t t = atomic_load(&ticket);
    while ((t & ((1 << LEFT) - 1)) && thread < (t >> LEFT & 0xfff))
        if (atomic_compare_exchange_weak(&ticket, &t, t - 1)) return (t & ((1 << LEFT) - 1)) - 1;
    return -1;
}

static void work(uint64_t thread) {
    for (long i; (i = claim(thread)) >= 0; atomic_fetch_add(&done, 1)) current_task(current_data, i);
}

INLINE void give_way(void) {
    for (int i = 0; i < PAUSES; i++) _mm_pause();
    sched_yield();
}

static void *worker(void *number) {
    uint64_t thread = (uint64_t)number;
    for (;;) {
        int seen = atomic_load(&sequence);
        work(thread);
        for (uint64_t from = __rdtsc(); atomic_load(&sequence) == seen && __rdtsc() - from < SPIN;) give_way();
        if (atomic_load(&sequence) != seen) continue;
        rest();
        atomic_fetch_add(&sleepers, 1);
        syscall(SYS_futex, &sequence, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        atomic_fetch_sub(&sleepers, 1);
    }
    return NULL;
}

/* A forked child has none of its parent's threads. */
static void forget(void) {
    started = 1;
    atomic_store(&sleepers, 0);
    atomic_store(&ticket, 0);
    atomic_flag_clear(&busy);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget); }

static void start(int threads) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (; started < threads; started++) {
        pthread_t made;
        if (pthread_create(&made, &attributes, worker, (void *)(uint64_t)started)) break;
    }
    pthread_attr_destroy(&attributes);
}

void parallel(void (*task)(void *, long), void *data, long tasks, int threads) {
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    if (threads < 2 || tasks < 2 || tasks >= 1 << LEFT || atomic_flag_test_and_set(&busy)) {
        for (long i = tasks; i-- > 0;) task(data, i);
        return;
    }
    if (started < threads) start(threads);
    current_task = task, current_data = data;
    atomic_store(&done, 0);
    uint64_t call = (uint32_t)atomic_load(&sequence) + 1;
    atomic_store(&ticket, call << 32 | (uint64_t)threads << LEFT | (uint64_t)tasks);
    atomic_fetch_add(&sequence, 1);
    if (atomic_load(&sleepers)) syscall(SYS_futex, &sequence, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    work(0);
    for (int i = 1; atomic_load(&done) < tasks; i++)
        if (i % PAUSES) _mm_pause();
        else sched_yield(); /* whoever holds the last task may wait for this core */
    atomic_flag_clear(&busy);
}
