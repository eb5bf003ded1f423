/* threads.c - parallel loops on the host's OpenMP pool or on a small pool of our own, and scratch.
 *
 * A process should have one pool: two would fight for the processors. PyTorch brings libgomp, so
 * when that is the only OpenMP runtime loaded we run on its threads, through GOMP_parallel, which
 * is what `#pragma omp parallel` compiles to. We never load a runtime ourselves. Tasks are claimed
 * from an atomic counter, so it does not matter how many threads the host really gives.
 *
 * A forked child has the parent's pool state but not its threads; entering libgomp's pool there can
 * wait for ever. A child therefore runs serially.
 */
#define _GNU_SOURCE /* dl_iterate_phdr, sched_getaffinity */
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#endif

#ifdef __AVX2__
#error "threads.c is baseline code: compile it without -mavx2 or -march"
#endif

static _Atomic int thread_limit;
static atomic_bool forked;
static _Thread_local bool inside_task;

static void in_forked_child(void) {
    atomic_store(&forked, true);
}

/* At load time: the parent may use the pool (through PyTorch) before our first parallel loop. */
__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, in_forked_child);
}

/* ---------------------------------------------------------------- one loop, many threads */

typedef struct loop {
    bnbq_task *run;
    void *context;
    int64_t tasks;
    _Atomic int64_t next;
    atomic_bool failed;
} loop;

#if defined(__x86_64__)
#include <xmmintrin.h>
typedef unsigned int fp_state;
static fp_state set_default_fp(void) {
    fp_state old = _mm_getcsr();
    _mm_setcsr(0x1f80); /* all exceptions masked, nearest, subnormals kept */
    return old;
}
static void restore_fp(fp_state old) {
    _mm_setcsr(old);
}
#elif defined(__aarch64__)
typedef uint64_t fp_state;
static fp_state set_default_fp(void) {
    fp_state old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"((fp_state)0));
    return old;
}
static void restore_fp(fp_state old) {
    __asm__ volatile("msr fpcr, %0" : : "r"(old));
}
#else
#include <fenv.h>
typedef fenv_t fp_state;
static fp_state set_default_fp(void) {
    fp_state old;
    fegetenv(&old);
    fesetenv(FE_DFL_ENV);
    return old;
}
static void restore_fp(fp_state old) {
    fesetenv(&old);
}
#endif

/* What every thread of a loop does. A failure stops the claiming: the result is void anyway. */
static void work_on(void *argument) {
    loop *shared = argument;
    fp_state host = set_default_fp();
    bool nested = inside_task;
    inside_task = true;
    int64_t task;
    while ((task = atomic_fetch_add(&shared->next, 1)) < shared->tasks) {
        if (atomic_load_explicit(&shared->failed, memory_order_relaxed))
            break;
        if (!shared->run(shared->context, task))
            atomic_store(&shared->failed, true);
    }
    inside_task = nested;
    restore_fp(host);
}

/* ---------------------------------------------------------------- libgomp */

typedef struct gomp {
    void (*parallel)(void (*run)(void *), void *argument, unsigned threads, unsigned flags);
    int (*max_threads)(void);
    int (*in_parallel)(void);
} gomp;

#ifdef __linux__

typedef struct runtimes {
    int count;
    char path[4096]; /* of the libgomp found; empty if another runtime is loaded */
} runtimes;

static int count_loads(struct dl_phdr_info *info, size_t size, void *loads) {
    (void)size;
    *(unsigned long long *)loads = info->dlpi_adds;
    return 1; /* the number is the same for every object: stop at the first */
}

static int find_openmp(struct dl_phdr_info *info, size_t size, void *argument) {
    (void)size;
    runtimes *found = argument;
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *name = slash ? slash + 1 : info->dlpi_name;
    if (!strstr(name, ".so"))
        return 0;
    bool is_gomp = strncmp(name, "libgomp", 7) == 0;
    if (!is_gomp && strncmp(name, "libomp", 6) != 0 && strncmp(name, "libiomp5", 8) != 0)
        return 0;
    found->count++;
    found->path[0] = '\0';
    if (is_gomp && strlen(info->dlpi_name) < sizeof found->path)
        strcpy(found->path, info->dlpi_name);
    return 0;
}

static bool bind_gomp(gomp *host) {
    runtimes found = {0};
    dl_iterate_phdr(find_openmp, &found);
    if (found.count != 1 || !found.path[0])
        return false;
    /* NOLOAD: only a library that is there. Its reference is kept, so it also stays there. */
    void *library = dlopen(found.path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library)
        return false;
    void *parallel = dlsym(library, "GOMP_parallel");
    void *max_threads = dlsym(library, "omp_get_max_threads");
    void *in_parallel = dlsym(library, "omp_in_parallel");
    if (!parallel || !max_threads || !in_parallel) {
        dlclose(library);
        return false;
    }
    /* ISO C has no cast from object to function pointer; POSIX promises equal representation. */
    memcpy(&host->parallel, &parallel, sizeof parallel);
    memcpy(&host->max_threads, &max_threads, sizeof max_threads);
    memcpy(&host->in_parallel, &in_parallel, sizeof in_parallel);
    return true;
}

/* The host's libgomp, or NULL. Looks again when an object was loaded since the last time; that
 * test costs one call with a callback, well under a microsecond. */
static const gomp *find_gomp(void) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static _Atomic unsigned long long seen_loads;
    static _Atomic(const gomp *) current;
    static gomp bound; /* written once: a process keeps its first libgomp */
    unsigned long long loads = 0;
    dl_iterate_phdr(count_loads, &loads);
    if (loads == atomic_load(&seen_loads))
        return atomic_load(&current);
    pthread_mutex_lock(&lock);
    if (loads != atomic_load(&seen_loads)) {
        gomp candidate;
        bool usable = bind_gomp(&candidate);
        if (usable && !bound.parallel)
            bound = candidate;
        atomic_store(&current, usable && bound.parallel == candidate.parallel ? &bound : NULL);
        atomic_store(&seen_loads, loads);
    }
    pthread_mutex_unlock(&lock);
    return atomic_load(&current);
}

#else

static const gomp *find_gomp(void) {
    return NULL;
}

#endif

/* ---------------------------------------------------------------- our own pool */

/* ceil(quota / period) of a cgroup v2 directory's cpu.max, or `none`. */
static long quota_of(const char *directory, long none) {
    char path[4200];
    long quota, period;
    snprintf(path, sizeof path, "%s/cpu.max", directory);
    FILE *file = fopen(path, "re");
    if (!file)
        return none;
    int fields = fscanf(file, "%ld %ld", &quota, &period); /* "max ..." reads as none */
    fclose(file);
    return fields == 2 && quota > 0 && period > 0 ? (quota + period - 1) / period : none;
}

/* The smallest quota on the way from this process's cgroup to the root. */
static long cgroup_processors(long most) {
    char line[2048], directory[4096] = "/sys/fs/cgroup";
    size_t root = strlen(directory);
    FILE *file = fopen("/proc/self/cgroup", "re");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "0::/", 4) == 0)
            snprintf(directory + root, sizeof directory - root, "%.*s",
                     (int)strcspn(line + 3, "\n"), line + 3);
    if (file)
        fclose(file);
    for (;;) {
        long quota = quota_of(directory, most);
        most = quota < most ? quota : most;
        char *slash = strrchr(directory, '/');
        if (strlen(directory) <= root)
            return most;
        *slash = '\0';
    }
}

static long processors(void) {
    long count = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set; /* fails on machines with more than CPU_SETSIZE processors: keep the count */
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        count = CPU_COUNT(&set);
    count = cgroup_processors(count);
#endif
    const char *text = getenv("OMP_NUM_THREADS");
    long wanted = text ? strtol(text, NULL, 10) : 0; /* "4,2" means 4 at the outermost level */
    if (wanted > 0 && wanted < count)
        count = wanted;
    return count < 1 ? 1 : count > 1024 ? 1024 : count;
}

/* A worker sleeps until a loop has a free seat, works, and sleeps again. `owner` is held by the
 * thread whose loop is running; another one that comes meanwhile works alone. */
static struct {
    pthread_mutex_t owner, lock;
    pthread_cond_t wake, done;
    loop *shared;
    int workers;
    _Atomic int seats, active; /* written under the lock; read without it while spinning */
} pool = {
    .owner = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static int own_threads;

static void count_own_threads(void) {
    own_threads = (int)processors();
}

static int pool_size(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, count_own_threads);
    return own_threads;
}

/* Wait for *number to become zero or stop being zero, but not for long: 20 to 100 us. Layers follow
 * each other closely, and waking a sleeping thread costs as much as a small layer. */
static void spin_while_zero(_Atomic int *number, bool zero) {
    for (int i = 0; i < 2000 && (atomic_load(number) == 0) == zero; i++) {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb");
#endif
    }
}

static void *worker(void *unused) {
    (void)unused;
    for (;;) {
        spin_while_zero(&pool.seats, true);
        pthread_mutex_lock(&pool.lock);
        while (pool.seats == 0)
            pthread_cond_wait(&pool.wake, &pool.lock);
        pool.seats--;
        pool.active++;
        loop *shared = pool.shared;
        pthread_mutex_unlock(&pool.lock);
        work_on(shared);
        pthread_mutex_lock(&pool.lock);
        if (--pool.active == 0)
            pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* With pool.lock held. Signals are for the host's threads. Fewer threads than asked is no error. */
static void start_workers(int count) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (pool.workers < count) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL) != 0)
            break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void run_on_pool(loop *shared, int threads) {
    if (pthread_mutex_trylock(&pool.owner) != 0) {
        work_on(shared);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    start_workers(threads - 1);
    pool.shared = shared;
    pool.seats = pool.workers < threads - 1 ? pool.workers : threads - 1;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);

    work_on(shared);

    pthread_mutex_lock(&pool.lock);
    pool.seats = 0; /* who has not come by now is not needed */
    pthread_mutex_unlock(&pool.lock);
    spin_while_zero(&pool.active, false);
    pthread_mutex_lock(&pool.lock);
    while (pool.active > 0)
        pthread_cond_wait(&pool.done, &pool.lock);
    pool.shared = NULL;
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}

/* ---------------------------------------------------------------- the door */

static int threads_of(const gomp *host) {
    if (atomic_load(&forked) || inside_task)
        return 1;
    if (host && host->in_parallel())
        return 1;
    int count = host ? host->max_threads() : pool_size();
    int limit = atomic_load(&thread_limit);
    return limit > 0 && limit < count ? limit : count;
}

/* Nothing of libgomp may be touched in a forked child. */
static const gomp *host_pool(void) {
    return atomic_load(&forked) ? NULL : find_gomp();
}

bool bnbq_serial_for(bnbq_task *run, void *context, int64_t tasks) {
    loop alone = {.run = run, .context = context, .tasks = tasks};
    work_on(&alone);
    return !alone.failed;
}

bool bnbq_parallel_for(bnbq_task *run, void *context, int64_t tasks) {
    if (tasks < 2 || inside_task)
        return bnbq_serial_for(run, context, tasks);
    const gomp *host = host_pool();
    int threads = threads_of(host);
    if (threads > tasks)
        threads = (int)tasks;
    if (threads < 2)
        return bnbq_serial_for(run, context, tasks);
    loop shared = {.run = run, .context = context, .tasks = tasks};
    if (host)
        host->parallel(work_on, &shared, (unsigned)threads, 0);
    else
        run_on_pool(&shared, threads);
    return !shared.failed;
}

int bnbq_thread_count(void) {
    return threads_of(host_pool());
}

void bnbq_set_thread_limit(int threads) {
    atomic_store(&thread_limit, threads > 0 ? threads : 0);
}

const char *bnbq_thread_backend(void) {
    if (atomic_load(&forked))
        return "serial (forked child)";
    return find_gomp() ? "libgomp" : "own pool";
}

/* ---------------------------------------------------------------- scratch */

typedef struct buffer {
    void *data;
    size_t bytes;
} buffer;

static _Thread_local buffer buffers[BNBQ_SCRATCH_SLOTS];
static pthread_key_t exit_key;
static bool exit_key_works;

static void free_buffers(void *unused) {
    (void)unused;
    for (int i = 0; i < BNBQ_SCRATCH_SLOTS; i++) {
        free(buffers[i].data);
        buffers[i] = (buffer){0};
    }
}

static void make_exit_key(void) {
    exit_key_works = pthread_key_create(&exit_key, free_buffers) == 0;
}

void *bnbq_scratch(int slot, size_t bytes) {
    buffer *mine = &buffers[slot];
    if (mine->data && bytes <= mine->bytes)
        return mine->data;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_exit_key);
    if (!exit_key_works || pthread_setspecific(exit_key, buffers) != 0)
        return NULL;
    if (bytes > SIZE_MAX - 64)
        return NULL;
    bytes = bytes ? (bytes + 63) / 64 * 64 : 64;
    free(mine->data);
    mine->data = aligned_alloc(64, bytes);
    mine->bytes = mine->data ? bytes : 0;
    return mine->data;
}
