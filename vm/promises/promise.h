/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the programs that prove what the series promises, each on a machine that is set up
 * to make it hard. A program is one promise and kselftest_harness.h cases; the machine it wants is
 * in its line "VM:", in the words of tools/boot. The cases call what users call: memfds, the
 * ioctls of /dev/udmabuf, and gup_test, the kernel's other caller of memfd_pin_folios().
 *
 * A case that must hold on any kernel that keeps the promise fails where it is not kept. One that
 * lacks something of the machine skips, with the reason.
 */
#ifndef PROMISE_H
#define PROMISE_H

#define _GNU_SOURCE

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/dma-buf.h>
#include <linux/memfd.h>
#include <linux/udmabuf.h>

#include "kselftest_harness.h"

/* Emulated and instrumented kernels are a hundred times slower than bare metal. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT 1200

/* The harnesses of the bases differ in what a case's result is, and in how its setup ends it. */
#ifdef KSELFTEST_PRIO_TEST
#define PASSED(metadata) ((metadata)->exit_code != KSFT_FAIL)
#define LEAVE_SETUP _exit(0)
#else
#define PASSED(metadata) ((metadata)->passed)
#define LEAVE_SETUP longjmp(_metadata->env, 1)
#endif

#define KIB 1024UL
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)
#define HUGE (2 * MIB)
#define PAGE 4096UL

#define MEMFD_NAME "promise"
#define THP_SETTING "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
#define POOL_2M "/sys/kernel/mm/hugepages/hugepages-2048kB/"
#define POOL_1G "/sys/kernel/mm/hugepages/hugepages-1048576kB/"
#define PARAMETERS "/sys/module/udmabuf/parameters/"

/* One kind of memory that a memfd can hold. */
struct kind {
	const char *name;
	size_t page;			/* bytes in one of its folios */
	unsigned int memfd_flags;
	const char *thp;		/* what THP_SETTING has to be */
	const char *pool;		/* of hugetlb: where sysfs tells about its pages */
};

static const struct kind shmem __attribute__((unused)) = {
	.name = "shmem", .page = PAGE, .thp = "never",
};

static const struct kind shmem_thp __attribute__((unused)) = {
	.name = "shmem_thp", .page = HUGE, .thp = "always",
};

static const struct kind hugetlb __attribute__((unused)) = {
	.name = "hugetlb", .page = HUGE, .memfd_flags = MFD_HUGETLB | MFD_HUGE_2MB,
	.thp = "never", .pool = POOL_2M,
};

/* Is this kernel Linux @major.@minor or later? For what bases do in different ways, and rightly so. */
static inline bool kernel_is(int major, int minor)
{
	struct utsname name;
	int is[2] = { 0, 0 };

	if (!uname(&name))
		sscanf(name.release, "%d.%d", &is[0], &is[1]);
	return is[0] > major || (is[0] == major && is[1] >= minor);
}

/* Files that hold one line */

static inline bool write_file(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), error;
	bool ok = false;

	if (fd >= 0) {
		ok = write(fd, value, strlen(value)) == (ssize_t)strlen(value);
		error = errno;
		close(fd);
		errno = error;
	}
	return ok;
}

static inline bool write_number(const char *path, long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%ld", value);
	return write_file(path, text);
}

/* The first word of a file, in a buffer that the next call overwrites; "" if there is none. */
static inline const char *read_word(const char *path)
{
	static char word[64];
	FILE *f = fopen(path, "re");

	word[0] = 0;
	if (f) {
		if (fscanf(f, "%63s", word) != 1)
			word[0] = 0;
		fclose(f);
	}
	return word;
}

/* The number after @key, or the first of the file where @key is empty. -1: there is none. */
static inline long value_of(const char *path, const char *key)
{
	FILE *f = fopen(path, "re");
	size_t len = strlen(key);
	long value = -1;
	char line[256];

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, key, len) &&
		    sscanf(line + len + strspn(line + len, ": \t"), "%ld", &value) == 1)
			break;
	if (f)
		fclose(f);
	return value;
}

static inline long pool_value(const char *pool, const char *name)
{
	char path[128];

	snprintf(path, sizeof(path), "%s%s", pool, name);
	return value_of(path, "");
}

/*
 * What a kernel says when it kills for want of memory has a trace, which tools/boot takes for a bug.
 * So a case that means that to happen keeps warnings off the console, and looks itself for what
 * else the kernel says: quiet_kernel() before, EXPECT_EQ(0, complaints()) after. Of the warnings
 * that name @known, complaints_but() lets one pass.
 */
static int quiet_kmsg __attribute__((unused)) = -1;

static inline void quiet_kernel(void)
{
	quiet_kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	lseek(quiet_kmsg, 0, SEEK_END);
	write_file("/proc/sys/kernel/printk", "4");
}

static inline int complaints_but(const char *known)
{
	static const char *const bugs[] = {
		"WARNING: ", "BUG: ", "kernel BUG at", "Oops", "KASAN", "UBSAN", "Bad page", "Bad rss",
		"corrupt", "possible ", "inconsistent lock", "refcount_t", "Underflow",
	};
	char record[2048];
	int n = 0;
	ssize_t len;

	/* EPIPE: a record was overwritten before it was read. */
	while ((len = read(quiet_kmsg, record, sizeof(record) - 1)) > 0 || errno == EPIPE) {
		if (len < 0)
			continue;
		record[len] = 0;
		if (known && strstr(record, "WARNING: ") && strstr(record, known)) {
			known = NULL;
			continue;
		}
		for (size_t i = 0; i < sizeof(bugs) / sizeof(*bugs); i++)
			if (strstr(record, bugs[i])) {
				printf("# %s\n", record);
				n++;
				break;
			}
	}
	close(quiet_kmsg);
	write_file("/proc/sys/kernel/printk", "7");
	return n;
}

static inline int complaints(void)
{
	return complaints_but(NULL);
}

/* The books: what must be as before once the last user of a buffer is gone */

struct books {
	long pins;
	long free, rsvd, surp;
	long free_1g, rsvd_1g;
	long vm_pin;			/* of this process, in kB */
	long fds;			/* as wide as all: no padding, which memcmp() would see */
};

static inline long pins(void)
{
	int fd = open("/proc/sys/vm/stat_refresh", O_RDONLY | O_CLOEXEC);
	char c;

	/* Each CPU keeps a part of the counters to itself until it is asked. */
	if (fd >= 0 && read(fd, &c, 1) < 0)
		perror("# /proc/sys/vm/stat_refresh");
	close(fd);
	return value_of("/proc/vmstat", "nr_foll_pin_acquired ") -
	       value_of("/proc/vmstat", "nr_foll_pin_released ");
}

static inline int open_fds(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int n = 0;

	while (dir && readdir(dir))
		n++;
	if (dir)
		closedir(dir);
	return n;
}

static inline struct books read_books(void)
{
	return (struct books) {
		.pins = pins(),
		.free = pool_value(POOL_2M, "free_hugepages"),
		.rsvd = pool_value(POOL_2M, "resv_hugepages"),
		.surp = pool_value(POOL_2M, "surplus_hugepages"),
		.free_1g = pool_value(POOL_1G, "free_hugepages"),
		.rsvd_1g = pool_value(POOL_1G, "resv_hugepages"),
		.vm_pin = value_of("/proc/self/status", "VmPin"),
		.fds = open_fds(),
	};
}

/* Some of what a last reference gives back is given back by a worker, a moment later. */
static inline struct books settled_books(const struct books *wanted)
{
	struct books b = read_books();

	for (int tries = 0; tries < 500 && memcmp(&b, wanted, sizeof(b)); tries++) {
		usleep(10000);
		b = read_books();
	}
	return b;
}

#define EXPECT_SAME_BOOKS(before) do { \
	struct books before_ = (before), after_ = settled_books(&before_); \
	EXPECT_EQ(before_.pins, after_.pins); \
	EXPECT_EQ(before_.free, after_.free); \
	EXPECT_EQ(before_.rsvd, after_.rsvd); \
	EXPECT_EQ(before_.surp, after_.surp); \
	EXPECT_EQ(before_.free_1g, after_.free_1g); \
	EXPECT_EQ(before_.rsvd_1g, after_.rsvd_1g); \
	EXPECT_EQ(before_.vm_pin, after_.vm_pin); \
	EXPECT_EQ(before_.fds, after_.fds); \
} while (0)

/* The pages that each CPU hoards. */
static inline long hoarded_kb(void)
{
	FILE *f = fopen("/proc/zoneinfo", "re");
	long kb = 0, count;
	char line[256];

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, " count: %ld", &count) == 1)
			kb += count * (long)(PAGE / KIB);
	if (f)
		fclose(f);
	return kb;
}

/*
 * What could be allocated: what MemAvailable says, and what CPUs hoard, of which it does not know. A CPU
 * takes and gives back up to 8 MiB at once: look again if one did meanwhile.
 */
static inline long available_kb(void)
{
	long hoarded, kb;

	do {
		hoarded = hoarded_kb();
		kb = value_of("/proc/meminfo", "MemAvailable");
	} while (labs(hoarded_kb() - hoarded) > 256);
	return kb + hoarded;
}

/* Memory and buffers */

/* A memfd of @kind that udmabuf takes; -1 and errno if there is none to be had. */
static inline int new_memfd(const struct kind *kind, size_t size)
{
	int fd;

	if (!write_file(THP_SETTING, kind->thp) && errno != ENOENT)
		return -1;
	fd = memfd_create(MEMFD_NAME, kind->memfd_flags | MFD_ALLOW_SEALING | MFD_CLOEXEC);
	if (fd >= 0 && (ftruncate(fd, size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* Maps at a multiple of 2 MiB, so that huge pages can be mapped as such. NULL: it cannot. */
static inline char *map_fd(int fd, size_t size, int prot)
{
	char *at = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			-1, 0);
	char *map;

	if (at == MAP_FAILED)
		return NULL;
	munmap(at, size + HUGE);
	at = (char *)(((uintptr_t)at + HUGE - 1) & ~(HUGE - 1));
	map = mmap(at, size, prot, MAP_SHARED | MAP_FIXED, fd, 0);
	return map == MAP_FAILED ? NULL : map;
}

/* Returns a buffer, or a negative errno. */
static inline int create_at(int dev, int memfd, __u64 offset, __u64 size)
{
	struct udmabuf_create arg = {
		.memfd = memfd, .flags = UDMABUF_FLAGS_CLOEXEC, .offset = offset, .size = size,
	};
	int fd = ioctl(dev, UDMABUF_CREATE, &arg);

	return fd < 0 ? -errno : fd;
}

/* The same, on /dev/udmabuf with its limit on the size raised out of the way. */
static inline int create(int memfd, __u64 offset, __u64 size)
{
	int dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC), fd;

	if (dev < 0)
		return -errno;
	write_number(PARAMETERS "size_limit_mb", 1 << 20);
	fd = create_at(dev, memfd, offset, size);
	close(dev);
	return fd;
}

/* A buffer that shows one item after the other; or a negative errno. */
static inline int create_list(const struct udmabuf_create_item *items, __u32 count)
{
	size_t bytes = sizeof(*items) * count;
	struct udmabuf_create_list *arg = calloc(1, sizeof(*arg) + bytes);
	int dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC), fd;

	if (dev < 0 || !arg)
		return -ENODEV;
	write_number(PARAMETERS "size_limit_mb", 1 << 20);
	arg->flags = UDMABUF_FLAGS_CLOEXEC;
	arg->count = count;
	memcpy(arg->list, items, bytes);
	fd = ioctl(dev, UDMABUF_CREATE_LIST, arg);
	fd = fd < 0 ? -errno : fd;
	free(arg);
	close(dev);
	return fd;
}

/*
 * A driver that maps a hugetlb memfd page by page, and not as page frames, has mapcounts go wrong
 * until the kernel dies.
 */
static inline bool maps_page_frames(const char *map)
{
	FILE *f = fopen("/proc/self/smaps", "re");
	bool here = false, yes = false;
	char line[512];
	void *start;

	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%p-%*x ", &start) == 1 && strchr(line, '-'))
			here = start == (const void *)map;
		if (here && !strncmp(line, "VmFlags:", 8)) {
			yes = strstr(line, " pf");
			break;
		}
	}
	if (f)
		fclose(f);
	return yes;
}

/* Maps a buffer of @kind. NULL: it cannot, or whoever touches it corrupts this kernel. */
static inline char *map_buffer(const struct kind *kind, int buffer, size_t size, int prot)
{
	char *map = map_fd(buffer, size, prot);

	if (map && kind->pool && !maps_page_frames(map)) {
		printf("# not tried: to map hugetlb pages corrupts memory on this kernel\n");
		munmap(map, size);
		map = NULL;
	}
	return map;
}

/*
 * Then a kernel keeps a record of each mapping for a device, which is charged to nobody, and
 * complains once a page is mapped more than seven times, which is nothing wrong.
 */
static inline bool dma_is_debugged(void)
{
	return !access("/sys/kernel/debug/dma-api", F_OK);
}

static inline int sync_buffer(int buffer, __u64 flags)
{
	struct dma_buf_sync arg = { .flags = flags };

	return ioctl(buffer, DMA_BUF_IOCTL_SYNC, &arg) ? -errno : 0;
}

/* Each page has a stamp that tells which page of the memfd it is, and who wrote it. */
static inline __u64 stamp(unsigned int who, size_t page)
{
	return (page + 1) * 0x9e3779b97f4a7c15ULL ^ who;
}

static inline __u64 *stamp_of(char *at, size_t page)
{
	return (__u64 *)at + page % (PAGE / sizeof(__u64));
}

/* @at shows pages @first to @first + @n of the memfd. */
static inline void fill(char *at, size_t first, size_t n, unsigned int who)
{
	for (size_t i = 0; i < n; i++)
		*stamp_of(at + i * PAGE, first + i) = stamp(who, first + i);
}

/* How many pages do not hold what @who wrote. */
static inline long wrong(char *at, size_t first, size_t n, unsigned int who)
{
	long bad = 0;

	for (size_t i = 0; i < n; i++)
		bad += *stamp_of(at + i * PAGE, first + i) != stamp(who, first + i);
	return bad;
}

/* Where in memory the pages of a mapping are */

#define PFN_NONE 0ULL

/* The frame of the page mapped at @at; PFN_NONE: not there. Only the page table is asked. */
static inline __u64 pfn_of(const char *at)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	__u64 entry = 0;

	if (pread(fd, &entry, sizeof(entry), (uintptr_t)at / PAGE * sizeof(entry)) < 0 ||
	    !(entry & (1ULL << 63)))
		entry = 0;
	close(fd);
	return entry & ((1ULL << 55) - 1);
}

/* The frames of @n pages, all at once. Tells whether each is there. */
static inline bool read_pfns(const char *at, size_t n, __u64 *pfns)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	bool all = pread(fd, pfns, n * sizeof(*pfns), (uintptr_t)at / PAGE * sizeof(*pfns)) ==
		   (ssize_t)(n * sizeof(*pfns));

	close(fd);
	for (size_t i = 0; all && i < n; i++)
		pfns[i] = pfns[i] & (1ULL << 63) ? pfns[i] & ((1ULL << 55) - 1) : PFN_NONE;
	for (size_t i = 0; all && i < n; i++)
		all = pfns[i] != PFN_NONE;
	return all;
}

struct pfn_range {
	__u64 start, end;
};

/* All of ZONE_MOVABLE that a node has, or the first node that has any. */
static inline struct pfn_range zone_movable(void)
{
	struct pfn_range zone = { 0, 0 };
	FILE *f = fopen("/proc/zoneinfo", "re");
	bool here = false;
	char line[256];
	__u64 value;

	while (f && fgets(line, sizeof(line), f)) {
		if (!strncmp(line, "Node", 4))
			here = strstr(line, "zone  Movable");
		else if (here && sscanf(line, " spanned %llu", &value) == 1)
			zone.end = value;
		else if (here && sscanf(line, " start_pfn: %llu", &value) == 1) {
			zone.start = value;
			if (zone.end)
				break;
		}
	}
	if (f)
		fclose(f);
	zone.end += zone.start;
	return zone;
}

/* How many of the pages mapped at @at are in @range. */
static inline long pages_in(struct pfn_range range, const char *at, size_t size)
{
	long n = 0;

	for (size_t offset = 0; offset < size; offset += PAGE) {
		__u64 pfn = pfn_of(at + offset);

		n += pfn >= range.start && pfn < range.end;
	}
	return n;
}

#endif
