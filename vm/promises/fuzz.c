// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: whatever a program passes to /dev/udmabuf, it gets a buffer or the errno that it always
 * got, and nothing is left of a call that failed or of a buffer that was closed.
 *
 * How a user would notice: /dev/udmabuf is open to unprivileged users on a desktop. A size that
 * overflows, or a pointer into nowhere, must not let one of them see other memory, nor eat up that
 * of the machine; and a virtual machine manager tells by the errno what it may try next.
 *
 * How this looks: calls with fields drawn from values at which something changes (pages, huge
 * pages, sizes of files, powers of two), or at random. A model of a few lines says which result
 * each has to have; the buffers are mapped, compared with the memfd, written, synced, closed. Two
 * processes do it at the same time, each with memfds of its own. After each round the books of the
 * machine are compared. The seed is printed: a round is the same again with the same seed.
 *
 * VM: MEM=4096 SMP=2
 */

#include "promise.h"
#include "drm.h"

#include <glob.h>

#define SEED 0x5eed2024u
#define CALLS 200000
#define ROUNDS 10
#define WORKERS 2

#define SHMEM_PAGES 20
/* No call that works has more: the limit of the driver is higher, but it has to take some time. */
#define MOST_BYTES (4 * MIB)
#define LIMIT_MB 64
#define LIST_LIMIT 1024
#define TERABYTE (1ULL << 40)
#define FOREVER LLONG_MAX

/* Any of two errnos; ANY_FD: a buffer. */
struct prediction {
	int result, other;
};

#define A_BUFFER 1

/* A descriptor, and what the driver should make of it */
struct target {
	int fd;
	bool is_memory, is_hugetlb, is_sealed_well;
	__u64 size;
	bool is_for_reading;	/* and not for writing */
};

#define MOST_TARGETS 160
#define MOST_BUFFERS 12

struct buffer {
	int fd;
	bool began;			/* has had a SYNC_START */
};

static struct {
	__u64 random;
	struct target targets[MOST_TARGETS];
	int nr_targets;
	struct buffer buffers[MOST_BUFFERS];
	int dev, own_buffer;
	char *edge;			/* what ends here can be read, what begins here cannot */
	bool may_map_hugetlb;
} w;

/* What the workers did, for the one who waits for them. */
static struct tally {
	_Atomic long calls, buffers, mapped, synced, unpredicted;
	_Atomic long results[256];	/* by errno */
} *tally;

static __u64 draw(void)
{
	w.random ^= w.random << 13;
	w.random ^= w.random >> 7;
	w.random ^= w.random << 17;
	return w.random * 0x2545f4914f6cdd1dULL;
}

static __u64 below(__u64 n)
{
	return (draw() >> 16) % n;
}

static bool one_in(unsigned int n)
{
	return !below(n);
}

/* The descriptors */

static void add_target(int fd, bool is_memory, bool is_hugetlb, bool is_sealed_well, __u64 size)
{
	if (w.nr_targets == MOST_TARGETS)
		abort();
	w.targets[w.nr_targets++] = (struct target) {
		.fd = fd, .is_memory = is_memory, .is_hugetlb = is_hugetlb,
		.is_sealed_well = is_sealed_well, .size = size,
	};
}

#define ALL_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)

static void add_memfd(const struct kind *kind, __u64 size, int seals)
{
	int fd = memfd_create(MEMFD_NAME, kind->memfd_flags | MFD_ALLOW_SEALING | MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, size) || fcntl(fd, F_ADD_SEALS, seals))
		abort();
	add_target(fd, true, kind->pool, (seals & F_SEAL_SHRINK) &&
		   !(seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)), size);
}

static void open_targets(void)
{
	int good = F_SEAL_SHRINK, fds[2], fd;
	char path[64];

	/* What works, more often than once in thirty-two. */
	for (int i = 0; i < 8; i++) {
		add_memfd(&shmem, SHMEM_PAGES * PAGE, good);
		add_memfd(&shmem, SHMEM_PAGES * PAGE + 123, good);
		add_memfd(&shmem, HUGE, good | F_SEAL_GROW);
	}
	for (int i = 0; i < 3; i++)
		add_memfd(&hugetlb, 2 * HUGE, good);
	for (int seals = 0; seals <= ALL_SEALS; seals++) {
		add_memfd(&shmem, SHMEM_PAGES * PAGE, seals);
		add_memfd(&hugetlb, HUGE, seals);
	}
	add_memfd(&shmem, 0, good);
	add_memfd(&shmem, FOREVER, good);
	add_memfd(&shmem, 1ULL << 62, good);
	add_memfd(&shmem, (1ULL << 32) + PAGE, good);
	add_memfd(&hugetlb, 0, good);
	add_memfd(&hugetlb, TERABYTE, good);

	/* Memory, but not a memfd that can be sealed. */
	fd = memfd_create(MEMFD_NAME, MFD_CLOEXEC);
	if (ftruncate(fd, HUGE))
		abort();
	add_target(fd, true, false, false, HUGE);
	add_target(open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), true, false, false, 0);
	add_target(open("/dev/hugepages", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), true, true, false, 0);
	/* The same file opened again, for reading; and as a path, which is no file to the kernel. */
	snprintf(path, sizeof(path), "/proc/self/fd/%d", w.targets[0].fd);
	add_target(open(path, O_RDONLY | O_CLOEXEC), true, false, true, w.targets[0].size);
	w.targets[w.nr_targets - 1].is_for_reading = true;
	add_target(open(path, O_PATH | O_CLOEXEC), false, false, false, 0);

	if (pipe2(fds, O_CLOEXEC))
		abort();
	add_target(fds[0], false, false, false, 0);
	add_target(fds[1], false, false, false, 0);
	add_target(open("/dev/null", O_RDWR | O_CLOEXEC), false, false, false, 0);
	add_target(open("/", O_RDONLY | O_CLOEXEC), false, false, false, 0);
	add_target(w.dev, false, false, false, 0);
	w.own_buffer = create_at(w.dev, w.targets[0].fd, 0, PAGE);
	add_target(w.own_buffer, false, false, false, 0);
	add_target(-1, false, false, false, 0);
	add_target(INT_MIN, false, false, false, 0);
	add_target(INT_MAX, false, false, false, 0);
	add_target(900, false, false, false, 0);
}

static const struct target *some_target(void)
{
	/* The first ones are those that work. */
	return &w.targets[one_in(2) ? below(27) : below(w.nr_targets)];
}

static const struct target *target_of(__u32 fd)
{
	for (int i = 0; i < w.nr_targets; i++)
		if (w.targets[i].fd == (int)fd)
			return &w.targets[i];
	return NULL;
}

/* The fields */

static __u64 some_number(__u64 file_size)
{
	static const __u64 edges[] = {
		0, PAGE, HUGE, SHMEM_PAGES * PAGE, MOST_BYTES, LIMIT_MB * MIB, 1ULL << 31,
		1ULL << 32, 1ULL << 43, TERABYTE, 1ULL << 52, 1ULL << 62, 1ULL << 63,
	};
	__u64 value;

	switch (below(8)) {
	case 0:
		value = edges[below(ARRAY_SIZE(edges))];
		break;
	case 1:
		value = file_size & ~(PAGE - 1);
		break;
	case 2:
		return draw() >> below(64);
	case 3:
		value = 1ULL << below(64);
		break;
	default:
		return below(SHMEM_PAGES) * PAGE;
	}
	if (one_in(2))
		value += (below(5) - 2) * PAGE;
	if (one_in(16))
		value += below(5) - 2;
	return value;
}

static void draw_item(struct udmabuf_create_item *item)
{
	const struct target *target = some_target();

	item->memfd = target->fd;
	item->__pad = draw();
	item->offset = some_number(target->size);
	item->size = one_in(3) ? some_number(target->size - item->offset) :
				 (1 + below(4)) * PAGE;
}

/* The model */

/* The errno for an offset that no file can have. */
static int beyond_any_file(void)
{
	return kernel_is(6, 2) ? EINVAL : EFBIG;
}

static struct prediction predict(const struct udmabuf_create_item *items, __u32 count)
{
	__u64 total = 0, most = LIMIT_MB * MIB;

	for (__u32 i = 0; i < count; i++) {
		if (items[i].offset % PAGE || items[i].size % PAGE || items[i].size > most - total)
			return (struct prediction) { -EINVAL, -EINVAL };
		total += items[i].size;
	}
	if (!total)
		return (struct prediction) { -EINVAL, -EINVAL };

	for (__u32 i = 0; i < count; i++) {
		const struct target *target = target_of(items[i].memfd);
		__u64 page, size;

		if (!target || !target->is_memory)
			return (struct prediction) { -EBADFD, -EBADFD };
		if (!target->is_sealed_well)
			return (struct prediction) { -EINVAL, -EINVAL };
		if (target->is_for_reading)
			return (struct prediction) { -EACCES, -EACCES };
		/* An item of no size may be anywhere: nothing of it is looked at. */
		if (!items[i].size)
			continue;
		if (items[i].offset > FOREVER) {
			if (target->is_hugetlb)
				return (struct prediction) { -EINVAL, -EINVAL };
			return (struct prediction) { -beyond_any_file(), -beyond_any_file() };
		}
		/* The page in which the file ends counts whole. */
		page = target->is_hugetlb ? HUGE : PAGE;
		size = (target->size + page - 1) & ~(page - 1);
		if (items[i].offset >= size)
			return (struct prediction) { -EINVAL, -EINVAL };
		if (items[i].size > size - items[i].offset)
			return (struct prediction) { -EINVAL, size > FOREVER ? -EFBIG : -EINVAL };
	}
	return (struct prediction) { A_BUFFER, A_BUFFER };
}

/* How much memory would be filled until the call fails or works. */
static __u64 weight(const struct udmabuf_create_item *items, __u32 count)
{
	__u64 total = 0;

	for (__u32 i = 0; i < count && items[i].size <= LIMIT_MB * MIB; i++)
		total += items[i].size;
	return total;
}

/* What is done with a buffer */

static void unpredicted(const char *what, const struct udmabuf_create_item *items, __u32 count,
			int result, struct prediction wanted)
{
	if (tally->unpredicted++ > 10)
		return;
	printf("# %s, %u items: %d, not %d or %d\n", what, count, result, wanted.result,
	       wanted.other);
	for (__u32 i = 0; i < count && i < 4; i++) {
		const struct target *target = target_of(items[i].memfd);

		printf("#   memfd %d, offset 0x%llx, size 0x%llx; %s, file size 0x%llx\n",
		       (int)items[i].memfd, items[i].offset, items[i].size,
		       !target || !target->is_memory ? "no memory" :
		       target->is_hugetlb ? "hugetlb" : "shmem", target ? target->size : 0);
	}
	fflush(stdout);
}

/* One page of the buffer, and of the memfd that it should be. */
static bool shows_memory(int fd, const struct udmabuf_create_item *items, __u32 count)
{
	__u64 total = weight(items, count), at = below(total / PAGE) * PAGE, in = at;
	__u64 here, there, mine = draw();
	__u32 i = 0;
	bool ok;
	char *map;

	while (in >= items[i].size)
		in -= items[i++].size;
	for (__u32 j = 0; j < count; j++)
		if (target_of(items[j].memfd)->is_hugetlb && !w.may_map_hugetlb)
			return true;
	map = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return false;
	tally->mapped++;
	in += items[i].offset;
	here = *(volatile __u64 *)(map + at);
	ok = pread(items[i].memfd, &there, sizeof(there), in) == sizeof(there) && here == there;
	*(volatile __u64 *)(map + at) = mine;
	ok &= pread(items[i].memfd, &there, sizeof(there), in) == sizeof(there) && mine == there;
	munmap(map, total);
	return ok;
}

static void sync_some(struct buffer *buffer)
{
	__u64 flags = one_in(8) ? draw() >> below(64) : below(8);
	int wanted = 0, result;

	if (buffer->fd < 0)
		return;
	if (flags & ~DMA_BUF_SYNC_VALID_FLAGS_MASK || !(flags & DMA_BUF_SYNC_RW))
		wanted = -EINVAL;
	else if (!(flags & DMA_BUF_SYNC_END))
		buffer->began = true;
	else if (!buffer->began)
		wanted = -EINVAL;
	result = sync_buffer(buffer->fd, flags);
	tally->synced++;
	if (result != wanted)
		unpredicted("sync", NULL, 0, result, (struct prediction) { wanted, wanted });
}

static void took(int fd, __u32 flags, const struct udmabuf_create_item *items, __u32 count)
{
	struct buffer *buffer = &w.buffers[below(MOST_BUFFERS)];
	bool cloexec = fcntl(fd, F_GETFD) & FD_CLOEXEC;

	tally->buffers++;
	if ((__u64)lseek(fd, 0, SEEK_END) != weight(items, count) ||
	    cloexec != (flags & UDMABUF_FLAGS_CLOEXEC) ||
	    (one_in(4) && !shows_memory(fd, items, count)))
		unpredicted("buffer", items, count, 0, (struct prediction) { 0, 0 });
	if (buffer->fd >= 0)
		close(buffer->fd);
	*buffer = (struct buffer) { .fd = fd };
}

/* A call */

#define MOST_ITEMS 40

/* Returns whether there was one. */
static bool call_create(void)
{
	static struct {
		struct udmabuf_create_list head;
		struct udmabuf_create_item items[MOST_ITEMS];
	} list;
	bool is_list = one_in(2), no_fd = one_in(500);
	struct udmabuf_create one;
	size_t bytes = sizeof(one);
	void *arg = &one;
	__u32 count = 1, missing = 0;
	struct prediction wanted;
	struct rlimit limit, none;
	int result;

	list.head.flags = one_in(4) ? draw() : below(2);
	if (is_list) {
		count = one_in(3) ? below(MOST_ITEMS + 1) : below(4);
		bytes = sizeof(list.head) + count * sizeof(list.items[0]);
		arg = &list;
	}
	for (__u32 i = 0; i < count; i++) {
		draw_item(&list.items[i]);
		/* For long lists to get anywhere. */
		if (i && one_in(2))
			list.items[i] = list.items[below(i)];
	}
	wanted = predict(list.items, count);
	/* EINVAL and EBADFD of a first item cost nothing; else, spare the memory. */
	if (weight(list.items, count) > MOST_BYTES &&
	    (wanted.result != -EINVAL || weight(list.items, count) <= LIMIT_MB * MIB))
		return false;
	list.head.count = count;
	one = (struct udmabuf_create) {
		list.items[0].memfd, list.head.flags, list.items[0].offset, list.items[0].size
	};
	if (is_list && one_in(32)) {
		list.head.count = one_in(2) ? LIST_LIMIT + 1 + below(3) : draw();
		/* The list is not read: it is where nothing is. */
		if (list.head.count > LIST_LIMIT)
			wanted = (struct prediction) { -EINVAL, -EINVAL };
		else if (list.head.count > count)
			wanted = (struct prediction) { -EFAULT, -EFAULT };
		else
			list.head.count = count;
	}

	/* At the end of what can be read, or past it. */
	if (one_in(16)) {
		missing = 1 + below(bytes);
		if (!is_list || bytes - missing < sizeof(list.head) || list.head.count <= LIST_LIMIT)
			wanted = (struct prediction) { -EFAULT, -EFAULT };
	}
	memcpy(w.edge - bytes + missing, arg, bytes - missing);
	arg = w.edge - bytes + missing;
	if (one_in(64)) {
		static const __u64 nowhere[] = {
			0, 1, PAGE, 0x7ffffffff000, 0x7fffffffffff, 0x8000000000000000,
			0xffff888000000000, 0xffffffff81000000, 0xfffffffffffffff8, ~0ULL,
		};

		arg = (void *)nowhere[below(ARRAY_SIZE(nowhere))];
		wanted = (struct prediction) { -EFAULT, -EFAULT };
	}

	if (no_fd) {
		getrlimit(RLIMIT_NOFILE, &limit);
		none = limit;
		none.rlim_cur = 0;
		setrlimit(RLIMIT_NOFILE, &none);
		if (wanted.result == A_BUFFER)
			wanted = (struct prediction) { -EMFILE, -EMFILE };
	}
	result = ioctl(w.dev, is_list ? UDMABUF_CREATE_LIST : UDMABUF_CREATE, arg);
	result = result < 0 ? -errno : result;
	if (no_fd)
		setrlimit(RLIMIT_NOFILE, &limit);

	if ((result < 0 ? result : A_BUFFER) != wanted.result &&
	    (result < 0 ? result : A_BUFFER) != wanted.other)
		unpredicted(is_list ? "list" : "create", list.items, count, result, wanted);
	tally->results[result < 0 ? -result : 0]++;
	if (result >= 0)
		took(result, list.head.flags, list.items, count);
	return true;
}

/* Numbers that are not the driver's. Those that the kernel has for all files have other types. */
static bool call_other(void)
{
	unsigned int number = _IOC(below(4), 'u', below(256), below(64));
	struct udmabuf_create arg = { .memfd = w.targets[0].fd, .size = PAGE };
	int result;

	if (one_in(2))
		number = (one_in(2) ? UDMABUF_CREATE : UDMABUF_CREATE_LIST) ^ 1U << below(32);
	if (number == UDMABUF_CREATE || number == UDMABUF_CREATE_LIST ||
	    _IOC_TYPE(number) != 'u')
		return false;
	result = ioctl(w.dev, number, &arg) < 0 ? -errno : 0;
	tally->results[-result]++;
	if (result != -ENOTTY)
		unpredicted("other ioctl", NULL, number, result,
			    (struct prediction) { -ENOTTY, -ENOTTY });
	return true;
}

/* Holes to fill again, under buffers that have what was there. */
static void punch(void)
{
	const struct target *target = some_target();

	if (target->is_memory && target->is_sealed_well)
		fallocate(target->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
			  target->size ? target->size : PAGE);
}

/* Returns how many memfds somebody holds on to in the end. */
static int work(unsigned int seed, long calls)
{
	int held = 0;
	char *area;

	w.random = seed * 0x9e3779b97f4a7c15ULL;
	w.dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	area = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	w.edge = area + 2 * PAGE;
	mprotect(w.edge, PAGE, PROT_NONE);
	for (int i = 0; i < MOST_BUFFERS; i++)
		w.buffers[i].fd = -1;
	open_targets();
	while (calls > 0) {
		if (!(one_in(20) ? call_other() : call_create()))
			continue;
		calls--;
		tally->calls++;
		if (one_in(8))
			sync_some(&w.buffers[below(MOST_BUFFERS)]);
		if (one_in(40))
			punch();
	}
	for (int i = 0; i < MOST_BUFFERS; i++)
		if (w.buffers[i].fd >= 0)
			close(w.buffers[i].fd);
	close(w.own_buffer);
	for (int i = 0; i < w.nr_targets; i++) {
		struct target *target = &w.targets[i];

		/* Opened for reading, sealed for good: no one can ask. */
		if (target->is_sealed_well && fcntl(target->fd, F_ADD_SEALS, F_SEAL_WRITE))
			held += errno == EBUSY;
	}
	return held;
}

static bool hugetlb_can_be_mapped(void)
{
	int memfd = new_memfd(&hugetlb, HUGE), buffer;
	char *map = map_fd(memfd, HUGE, PROT_READ | PROT_WRITE);
	bool yes;

	map[0] = 1;
	munmap(map, HUGE);
	buffer = create(memfd, 0, HUGE);
	yes = buffer >= 0 && maps_frames(buffer);
	close(buffer);
	close(memfd);
	return yes;
}

/* What KASAN keeps of freed memory is given back when the cache that it belongs to shrinks. */
static long available_kb_shrunk(void)
{
	glob_t caches;

	if (!glob("/sys/kernel/slab/*/shrink", 0, NULL, &caches)) {
		for (size_t i = 0; i < caches.gl_pathc; i++)
			write_file(caches.gl_pathv[i], "1");
		globfree(&caches);
	}
	return available_kb();
}

TEST(ioctls)
{
	struct books before = read_books();
	unsigned int seed = SEED;
	long memory = 0;

	if (access("/dev/udmabuf", F_OK))
		SKIP(return, "no /dev/udmabuf");
	w.may_map_hugetlb = hugetlb_can_be_mapped();
	tally = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	write_number(PARAMETERS "size_limit_mb", LIMIT_MB);
	write_number(PARAMETERS "list_limit", LIST_LIMIT);
	printf("# seeds from 0x%x on\n", seed);
	fflush(stdout);
	for (int round = 0; round < ROUNDS; round++) {
		pid_t workers[WORKERS];
		int status;

		for (int i = 0; i < WORKERS; i++, seed++) {
			workers[i] = fork();
			if (!workers[i])
				_exit(work(seed, CALLS / ROUNDS / WORKERS));
		}
		for (int i = 0; i < WORKERS; i++) {
			ASSERT_EQ(workers[i], waitpid(workers[i], &status, 0));
			/* The exit status is the number of memfds that are still held. */
			EXPECT_EQ(0, status);
		}
		EXPECT_SAME_BOOKS(before);
		/* Caches have their size after the first. */
		if (!round)
			memory = available_kb_shrunk();
	}
	EXPECT_GE(4096, memory - available_kb_shrunk());
	EXPECT_EQ(0, tally->unpredicted);
	EXPECT_LE(CALLS, tally->calls);
	printf("# %ld calls, %ld buffers, %ld mapped, %ld synced; by errno:", tally->calls,
	       tally->buffers, tally->mapped, tally->synced);
	for (int i = 1; i < 256; i++)
		if (tally->results[i])
			printf(" %s %ld", strerrorname_np(i), tally->results[i]);
	printf("\n");
	/* All kinds of results were met, so that the model was asked. */
	EXPECT_LT(CALLS / 50, tally->buffers);
	EXPECT_LT(CALLS / 200, tally->results[EBADFD]);
	EXPECT_LT(CALLS / 200, tally->results[EFAULT]);
	EXPECT_LT(0, tally->results[beyond_any_file()]);
	EXPECT_LT(0, tally->results[EMFILE]);
}

/* One more than the most: too rare to be drawn where the memory would be there. */
TEST(limits)
{
	struct {
		struct udmabuf_create_list head;
		struct udmabuf_create_item items[LIST_LIMIT + 1];
	} *list = calloc(1, sizeof(*list));
	int dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	int memfd = new_memfd(&shmem, 8 * MIB);

	if (dev < 0)
		SKIP(return, "no /dev/udmabuf");
	write_number(PARAMETERS "size_limit_mb", 4);
	write_number(PARAMETERS "list_limit", LIST_LIMIT);
	EXPECT_LE(0, create_at(dev, memfd, 4 * MIB, 4 * MIB));
	EXPECT_EQ(-EINVAL, create_at(dev, memfd, 0, 4 * MIB + PAGE));
	for (int i = 0; i <= LIST_LIMIT; i++)
		list->items[i] = (struct udmabuf_create_item) {
			.memfd = memfd, .offset = i * PAGE, .size = PAGE,
		};
	list->head.count = LIST_LIMIT;
	EXPECT_LE(0, ioctl(dev, UDMABUF_CREATE_LIST, list));
	/* It is the sum that counts. */
	list->items[LIST_LIMIT - 1].size = 2 * PAGE;
	EXPECT_EQ(-1, ioctl(dev, UDMABUF_CREATE_LIST, list));
	EXPECT_EQ(EINVAL, errno);
	write_number(PARAMETERS "size_limit_mb", LIMIT_MB);
	EXPECT_LE(0, ioctl(dev, UDMABUF_CREATE_LIST, list));
	list->head.count = LIST_LIMIT + 1;
	EXPECT_EQ(-1, ioctl(dev, UDMABUF_CREATE_LIST, list));
	EXPECT_EQ(EINVAL, errno);
	free(list);
}

TEST_HARNESS_MAIN
