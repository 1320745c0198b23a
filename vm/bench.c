// SPDX-License-Identifier: GPL-2.0
/*
 * What udmabuf costs, in instructions: under QEMU's "-icount shift=0" the clock of the guest counts
 * them, one a nanosecond, and counts the same on every run. See tools/bench.
 *
 * Process 1 of a machine that has nothing else to do. Prints a line for each measurement,
 * "KIND OPERATION BYTES VALUE", and ends with "done".
 *
 * Each operation runs on memory of each kind and size, on a memfd of its own; small ones a few
 * times, of which the cheapest counts: that one met no timer interrupt, and what is there only
 * for the first caller was there.
 *
 * The kernel's command line says with "bench.nohugemap" that this kernel must not map a udmabuf of
 * hugetlb memory: 6.1 corrupts the page tables.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <linux/dma-buf.h>
#include <linux/memfd.h>
#include <linux/udmabuf.h>

#include "gup_test.h"	/* of the patched tree: mm/ */

#define KIB 1024UL
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)
#define PAGE (4 * KIB)
#define HUGE (2 * MIB)
#define LARGEST (4 * GIB)
#define HUGE_PAGES "2060"
#define LIST 1024		/* items */

static const struct kind {
	const char *name, *thp;
	size_t page;
	unsigned int flags;
} kinds[] = {
	{ "shmem", "never", PAGE, 0 },
	{ "thp", "always", HUGE, 0 },
	{ "hugetlb", "never", HUGE, MFD_HUGETLB | MFD_HUGE_2MB },
};

static int dev, gup_test;
static bool hugetlb_maps;

static unsigned long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static void write_file(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		printf("# %s: %s\n", path, strerror(errno));
	close(fd);
}

/* What the kernel holds for itself: its slabs, and what it maps for itself. */
static long kernel_bytes(void)
{
	FILE *f = fopen("/proc/meminfo", "r");
	long kb, sum = 0;
	char line[128];

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "SUnreclaim: %ld", &kb) == 1 ||
		    sscanf(line, "VmallocUsed: %ld", &kb) == 1)
			sum += kb * KIB;
	if (f)
		fclose(f);
	return sum;
}

/*
 * What went before has its last memory given back a grace period later, and leaves free objects in
 * slabs, which would hide what a large buffer takes, or count for it. A small one finds them there in
 * real life.
 */
static void settle(size_t size)
{
	glob_t slabs = { 0 };

	usleep(100000);
	if (size < 64 * MIB)
		return;
	glob("/sys/kernel/slab/*/shrink", 0, NULL, &slabs);
	for (size_t i = 0; i < slabs.gl_pathc; i++)
		write_file(slabs.gl_pathv[i], "1");
	globfree(&slabs);
}

static int new_memfd(const struct kind *kind, size_t size)
{
	int fd;

	write_file("/sys/kernel/mm/transparent_hugepage/shmem_enabled", kind->thp);
	fd = memfd_create("bench", MFD_ALLOW_SEALING | kind->flags);
	if (fd < 0 || ftruncate(fd, size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))
		printf("# memfd of %zu bytes: %s\n", size, strerror(errno));
	return fd;
}

/* At a multiple of 2 MiB. */
static char *map(int fd, size_t size)
{
	char *at = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			-1, 0);

	munmap(at, size + HUGE);
	at = (char *)(((unsigned long)at + HUGE - 1) & ~(HUGE - 1));
	return mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
}

static void touch(char *at, size_t size, size_t step)
{
	for (size_t i = 0; i < size; i += step)
		((volatile char *)at)[i] = 1;
}

/*
 * Allocates the memory in an order that leaves no two pages side by side, as those of a memfd
 * that has been in use for long are.
 */
static void populate(const struct kind *kind, int fd, size_t size)
{
	size_t pages = size / PAGE, stride = 1;
	char *at = map(fd, size);

	if (kind->page == PAGE)
		while (stride < 61 && stride * 2 < pages)
			stride *= 2;
	for (size_t first = 0; first < stride; first++)
		touch(at + first * PAGE, size - first * PAGE,
		      kind->page == PAGE ? stride * PAGE : kind->page);
	munmap(at, size);
}

static int create(int memfd, size_t size, unsigned int items)
{
	struct udmabuf_create_list *list;
	int fd;

	if (items == 1) {
		struct udmabuf_create arg = { .memfd = memfd, .size = size };

		return ioctl(dev, UDMABUF_CREATE, &arg);
	}
	list = calloc(1, sizeof(*list) + items * sizeof(list->list[0]));
	list->count = items;
	for (unsigned int i = 0; i < items; i++) {
		list->list[i].memfd = memfd;
		list->list[i].offset = i * (size / items);
		list->list[i].size = size / items;
	}
	fd = ioctl(dev, UDMABUF_CREATE_LIST, list);
	free(list);
	return fd;
}

static void sync_buffer(int fd, unsigned long flags)
{
	struct dma_buf_sync arg = { .flags = flags };

	if (ioctl(fd, DMA_BUF_IOCTL_SYNC, &arg))
		printf("# sync: %s\n", strerror(errno));
}

/* By memfd_pin_folios() and unpin_folios() alone, where the kernel has a test of them. */
static void pin(int memfd, size_t size, unsigned long *pin_cost, unsigned long *unpin_cost)
{
	struct gup_test_memfd arg = { .fd = memfd, .end = size - 1, .max_folios = size / PAGE };

	if (ioctl(gup_test, PIN_MEMFD_TEST, &arg) || arg.result < 0)
		return;
	*pin_cost = arg.get_delta_usec * 1000;
	*unpin_cost = arg.put_delta_usec * 1000;
}

enum {
	CREATE, METADATA, FIRST_SYNC, NEXT_SYNC, MMAP, FIRST_TOUCH, TOUCH, MUNMAP, RELEASE,
	PIN, UNPIN, RESULTS
};

static const char *const names[RESULTS] = {
	"create", "metadata", "first-sync", "next-sync", "mmap", "first-touch", "touch", "munmap",
	"release", "pin", "unpin",
};

/* The life of one buffer. @values get what each step took. */
static bool life(const struct kind *kind, size_t size, bool holes, unsigned int items,
		 unsigned long *values)
{
	int memfd = new_memfd(kind, size), fd;
	bool maps = hugetlb_maps || !kind->flags;
	unsigned long t;
	long before, after;
	char *at;

	if (!holes)
		populate(kind, memfd, size);
	settle(size);
	before = kernel_bytes();
	t = now();
	fd = create(memfd, size, items);
	values[CREATE] = now() - t;
	if (fd < 0) {
		printf("# create %s %zu: %s\n", kind->name, size, strerror(errno));
		close(memfd);
		return false;
	}
	settle(size);
	after = kernel_bytes();
	values[METADATA] = after > before ? after - before : 0;

	for (int i = FIRST_SYNC; i <= NEXT_SYNC; i++) {
		t = now();
		sync_buffer(fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW);
		values[i] = now() - t;
		sync_buffer(fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_RW);
	}

	if (maps) {
		t = now();
		at = map(fd, size);
		values[MMAP] = now() - t;
		t = now();
		touch(at, 1, 1);
		values[FIRST_TOUCH] = now() - t;
		munmap(at, size);

		at = map(fd, size);
		t = now();
		touch(at, size, PAGE);
		values[TOUCH] = now() - t;
		t = now();
		munmap(at, size);
		values[MUNMAP] = now() - t;
	}

	t = now();
	close(fd);
	values[RELEASE] = now() - t;
	if (items == 1 && !holes)
		pin(memfd, size, &values[PIN], &values[UNPIN]);
	close(memfd);
	return true;
}

static void measure(const struct kind *kind, size_t size, bool holes, unsigned int items)
{
	unsigned long best[RESULTS], values[RESULTS] = { 0 };
	int rounds = size <= 4 * MIB ? 20 : size <= 64 * MIB ? 3 : 1;

	memset(best, 0xff, sizeof(best));
	for (int i = 0; i < rounds; i++) {
		if (!life(kind, size, holes, items, values))
			return;
		for (int n = 0; n < RESULTS; n++)
			if (values[n] && values[n] < best[n])
				best[n] = values[n];
	}
	for (int n = 0; n < RESULTS; n++) {
		if (best[n] == -1UL)
			continue;
		printf("%s %s%s%s %zu %lu\n", kind->name, names[n], holes ? "-holes" : "",
		       items > 1 ? "-list" : "", size, best[n]);
		if (holes)
			break;
	}
}

static bool option(const char *name)
{
	char line[512] = "";
	FILE *f = fopen("/proc/cmdline", "r");

	if (f) {
		if (!fgets(line, sizeof(line), f))
			line[0] = 0;
		fclose(f);
	}
	return strstr(line, name);
}

int main(void)
{
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("none", "/proc", "proc", 0, NULL);
	mount("none", "/sys", "sysfs", 0, NULL);
	mount("none", "/sys/kernel/debug", "debugfs", 0, NULL);
	mount("none", "/dev", "devtmpfs", 0, NULL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	write_file("/sys/module/udmabuf/parameters/size_limit_mb", "8192");
	dev = open("/dev/udmabuf", O_RDWR);
	gup_test = open("/sys/kernel/debug/gup_test", O_RDWR);
	hugetlb_maps = !option("bench.nohugemap");
	for (unsigned int k = 0; k < 3; k++) {
		const struct kind *kind = &kinds[k];

		if (kind->flags)
			write_file("/proc/sys/vm/nr_hugepages", HUGE_PAGES);
		for (size_t size = kind->page; size <= LARGEST; size *= 2) {
			measure(kind, size, false, 1);
			measure(kind, size, true, 1);
			if (size / kind->page >= LIST)
				measure(kind, size, false, LIST);
		}
	}
	printf("done\n");
	fflush(stdout);
	reboot(RB_POWER_OFF);
	return 0;
}
