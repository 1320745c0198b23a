// SPDX-License-Identifier: GPL-2.0
/*
 * Promised: pins of a memfd are pins as anybody's. The same memory can be held for long by several
 * at once, by buffers, by fixed buffers of io_uring and by other users of pin_user_pages(), who
 * come and go in any order; all see the same memory, and it is nowhere it must not be.
 *
 * A user would notice the opposite as a registration of io_uring that fails once there is a buffer
 * of the same memory (a driver that holds plain references keeps it in ZONE_MOVABLE, from where
 * nobody can move it any more); or as a device that works on memory the program does not see.
 *
 * So: begin with memory in ZONE_MOVABLE, have the holders come in every order and go in every
 * order, and look at page frames and content after each step. gup_test pins and unpins the
 * mapping once more at each step, and warns if it got a page that must not be pinned for long.
 *
 * VM: MEM=4096 SMP=2 APPEND="movablecore=1G"
 */

#include "moving.h"

#include <linux/io_uring.h>
#include <sys/uio.h>

#include "mm/gup_test.h"

#define SIZE (4 * MIB)
#define PAGES (SIZE / PAGE)
#define ROUNDS 8

static struct {
	const struct kind *kind;
	struct books before;
	struct pfn_range zone;
	long pool;			/* to be put back */
	int memfd, gup;
	char *mem;
} t;

/* io_uring, as far as it is needed: one request at a time */

static struct {
	int fd;
	char *rings;
	struct io_uring_sqe *sqes;
	struct io_uring_params p;
} ring;

static int setup_ring(void)
{
	ring.fd = syscall(__NR_io_uring_setup, 4, &ring.p);
	if (ring.fd < 0)
		return -errno;
	ring.rings = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd,
			  IORING_OFF_SQ_RING);
	if (ring.rings == MAP_FAILED)
		ring.rings = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd,
				  IORING_OFF_SQ_RING);
	ring.sqes = mmap(NULL, 4 * sizeof(*ring.sqes), PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd,
			 IORING_OFF_SQES);
	return ring.rings == MAP_FAILED || ring.sqes == MAP_FAILED ? -errno : 0;
}

/* Moves all of the memory to or from a file, by its frames and not by the page tables. */
static int fixed_io(int op, int file)
{
	unsigned int *tail = (unsigned int *)(ring.rings + ring.p.sq_off.tail);
	unsigned int *array = (unsigned int *)(ring.rings + ring.p.sq_off.array);
	unsigned int *head = (unsigned int *)(ring.rings + ring.p.cq_off.head);
	struct io_uring_cqe *cqes = (struct io_uring_cqe *)(ring.rings + ring.p.cq_off.cqes);
	unsigned int at = *tail % ring.p.sq_entries;
	int res;

	ring.sqes[at] = (struct io_uring_sqe) {
		.opcode = op, .fd = file, .addr = (uintptr_t)t.mem, .len = SIZE,
	};
	array[at] = at;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		return -errno;
	res = cqes[*head % ring.p.cq_entries].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return res;
}

/* Who holds the memory for long. take() returns a negative errno where it cannot. */

static int buffers[2];

static int take_first_buffer(void)
{
	buffers[0] = create(t.memfd, 0, SIZE);
	return buffers[0];
}

static void drop_first_buffer(void)
{
	close(buffers[0]);
}

static int take_second_buffer(void)
{
	buffers[1] = create(t.memfd, 0, SIZE);
	return buffers[1];
}

static void drop_second_buffer(void)
{
	close(buffers[1]);
}

static int take_ring(void)
{
	struct iovec iov = { .iov_base = t.mem, .iov_len = SIZE };

	return syscall(__NR_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &iov, 1) ?
	       -errno : 0;
}

static void drop_ring(void)
{
	syscall(__NR_io_uring_register, ring.fd, IORING_UNREGISTER_BUFFERS, NULL, 0);
}

#ifdef PIN_MEMFD_HOLD
/* Another driver that calls memfd_pin_folios(): since there is only one in the kernel, a test. */
static int take_folios(void)
{
	struct gup_test_memfd arg = {
		.fd = t.memfd, .end = SIZE - 1, .max_folios = PAGES,
	};

	if (ioctl(t.gup, PIN_MEMFD_HOLD, &arg))
		return -errno;
	return arg.result;
}

static void drop_folios(void)
{
	ioctl(t.gup, PIN_MEMFD_RELEASE);
}
#endif

static const struct holder {
	const char *name;
	int (*take)(void);
	void (*drop)(void);
} holders[] = {
	{ "a buffer", take_first_buffer, drop_first_buffer },
	{ "io_uring", take_ring, drop_ring },
	{ "another buffer", take_second_buffer, drop_second_buffer },
#ifdef PIN_MEMFD_HOLD
	{ "gup_test", take_folios, drop_folios },
#endif
};

#define NR_HOLDERS ((int)ARRAY_SIZE(holders))

/* The @nth of all orders of the holders; there are as many as the factorial of their number. */
static void get_order(int nth, int *order)
{
	bool used[NR_HOLDERS] = {};

	for (int left = NR_HOLDERS; left > 0; nth /= left--) {
		int skip = nth % left, i = 0;

		while (used[i] || skip--)
			i++;
		used[i] = true;
		order[NR_HOLDERS - left] = i;
	}
}

static int nr_orders(void)
{
	int n = 1;

	for (int i = 2; i <= NR_HOLDERS; i++)
		n *= i;
	return n;
}

/* Pins all of the mapping for long, and unpins it. Tells how many bytes it got. */
static long pin_mapping(void)
{
	struct gup_test gup = {
		.addr = (uintptr_t)t.mem, .size = SIZE, .nr_pages_per_call = PAGES,
		.gup_flags = 1,		/* FOLL_WRITE */
	};

	return ioctl(t.gup, PIN_LONGTERM_BENCHMARK, &gup) ? -errno : (long)gup.size;
}

FIXTURE(neighbours) {
};

FIXTURE_VARIANT(neighbours) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(neighbours, shmem) { .kind = &shmem };

FIXTURE_VARIANT_ADD(neighbours, shmem_thp) { .kind = &shmem_thp };

FIXTURE_VARIANT_ADD(neighbours, hugetlb) { .kind = &hugetlb };

/* New memory, in the zone: a pool that was used may have pages from elsewhere by now. */
static void fill_in_zone(struct __test_metadata *_metadata, unsigned int who)
{
	size_t huge = t.kind->page / PAGE;
	__u64 pfns[PAGES];

	ASSERT_EQ(0, fallocate(t.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, SIZE));
	if (t.kind->pool) {
		munmap(t.mem, SIZE);	/* and with it, its reservation */
		write_number(POOL_2M "nr_hugepages", 0);
		write_number(POOL_2M "nr_hugepages", SIZE / HUGE);
		t.mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);
		ASSERT_NE(NULL, t.mem);
	}
	fill(t.mem, 0, PAGES, who);
	ASSERT_TRUE(read_pfns(t.mem, PAGES, pfns));
	for (size_t i = 0; i < PAGES; i++)
		ASSERT_EQ(i % huge, (pfns[i] - pfns[i / huge * huge]));
	ASSERT_EQ((long)PAGES, pfns_in(t.zone, pfns, PAGES));
}

FIXTURE_SETUP(neighbours)
{
	t.kind = variant->kind;
	t.memfd = -1;
	t.pool = pool_value(POOL_2M, "nr_hugepages");
	t.zone = zone_movable();
	if (t.zone.start == t.zone.end)
		SKIP(LEAVE_SETUP, "no ZONE_MOVABLE: boot with movablecore=");
	t.gup = open("/sys/kernel/debug/gup_test", O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, t.gup);
	ASSERT_EQ(0, setup_ring());
	write_number(POOL_2M "nr_hugepages", t.kind->pool ? SIZE / HUGE : 0);
	t.before = read_books();
	t.memfd = new_memfd(t.kind, SIZE);
	ASSERT_LE(0, t.memfd);
	t.mem = map_fd(t.memfd, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, t.mem);
}

FIXTURE_TEARDOWN(neighbours)
{
	drop_ring();
	if (t.mem)
		munmap(t.mem, SIZE);
	close(t.memfd);
	EXPECT_SAME_BOOKS(t.before);
	write_number(POOL_2M "nr_hugepages", 0);
	write_number(POOL_2M "nr_hugepages", t.pool);
}

/* While anybody holds the memory, it is where it was, or has just left the zone. */
static void check_step(struct __test_metadata *_metadata, __u64 *pfns, bool first)
{
	__u64 now[PAGES];

	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1000));
	EXPECT_TRUE(read_pfns(t.mem, PAGES, now));
	EXPECT_EQ(0, pfns_in(t.zone, now, PAGES));
	if (!first)
		EXPECT_EQ(0, memcmp(now, pfns, sizeof(now)));
	memcpy(pfns, now, sizeof(now));
	EXPECT_EQ((long)SIZE, pin_mapping());
}

static void come_and_go(struct __test_metadata *_metadata, const int *come, const int *go,
			bool compact)
{
	bool holds[NR_HOLDERS] = {};
	__u64 pfns[PAGES];

	fill_in_zone(_metadata, 1000);
	for (int i = 0; i < NR_HOLDERS; i++) {
		int ret = holders[come[i]].take();

		EXPECT_LE(0, ret)
			TH_LOG("%s, after %d others", holders[come[i]].name, i);
		holds[come[i]] = ret >= 0;
		check_step(_metadata, pfns, i == 0);
	}
	if (compact)
		write_number("/proc/sys/vm/compact_memory", 1);
	for (int i = 0; i < NR_HOLDERS; i++) {
		check_step(_metadata, pfns, false);
		if (holds[go[i]])
			holders[go[i]].drop();
	}
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1000));
	for (int tries = 0; tries < 500 && pins() != t.before.pins; tries++)
		usleep(10000);
	EXPECT_EQ(t.before.pins, pins());
}

/*
 * Whoever comes first has to take the memory out of the zone, by whatever way it pins: all give the
 * same answer, and the kernel has no complaint. Then a buffer comes.
 */
static void come_first(struct __test_metadata *_metadata, int (*take)(void), void (*drop)(void))
{
	__u64 pfns[PAGES];

	fill_in_zone(_metadata, 1000);
	quiet_kernel();
	EXPECT_LE(0, take());
	EXPECT_EQ(0, complaints());
	check_step(_metadata, pfns, true);
	EXPECT_LE(0, take_first_buffer());
	check_step(_metadata, pfns, false);
	drop();
	check_step(_metadata, pfns, false);
	drop_first_buffer();
}

TEST_F(neighbours, io_uring_comes_before_a_buffer)
{
	come_first(_metadata, take_ring, drop_ring);
}

static int pin_once(void)
{
	return pin_mapping() == (long)SIZE ? 0 : -1;
}

static void drop_nothing(void)
{
}

/* As drivers of network cards and GPUs do: pin_user_pages(), which gup_test calls here. */
TEST_F(neighbours, a_driver_comes_before_a_buffer)
{
	come_first(_metadata, pin_once, drop_nothing);
}

/*
 * Every order to come, and every order to go, each with three of the others. Compaction, which
 * takes long, must leave alone what is pinned: once is enough.
 */
TEST_F(neighbours, come_and_go_in_every_order)
{
	int come[NR_HOLDERS], go[NR_HOLDERS], n = 0;

	for (int i = 0; i < nr_orders() && PASSED(_metadata); i++) {
		for (int k = 0; k < 3 && PASSED(_metadata); k++) {
			get_order(i, come);
			get_order((i + k * nr_orders() / 3) % nr_orders(), go);
			come_and_go(_metadata, come, go, n++ == 0);
		}
	}
	printf("# %d sequences\n", n);
}

/* What each writes, all others see. */
TEST_F(neighbours, share_what_they_write)
{
	int file = memfd_create("file", MFD_CLOEXEC);
	char *out, *map;

	ASSERT_LE(0, file);
	ASSERT_EQ(0, ftruncate(file, SIZE));
	out = map_fd(file, SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, out);

	fill_in_zone(_metadata, 1000);
	ASSERT_LE(0, take_first_buffer());
	EXPECT_EQ(0, take_ring());
	map = map_buffer(t.kind, buffers[0], SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	EXPECT_EQ((long)SIZE, (long)fixed_io(IORING_OP_WRITE_FIXED, file));
	EXPECT_EQ(0, wrong(out, 0, PAGES, 1000));
	fill(map, 0, PAGES, 1001);
	EXPECT_EQ((long)SIZE, (long)fixed_io(IORING_OP_WRITE_FIXED, file));
	EXPECT_EQ(0, wrong(out, 0, PAGES, 1001));
	fill(out, 0, PAGES, 1002);
	EXPECT_EQ((long)SIZE, (long)fixed_io(IORING_OP_READ_FIXED, file));
	EXPECT_EQ(0, wrong(map, 0, PAGES, 1002));
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1002));

	/* It stays so for those who are left. */
	munmap(map, SIZE);
	drop_first_buffer();
	fill(t.mem, 0, PAGES, 1003);
	EXPECT_EQ((long)SIZE, (long)fixed_io(IORING_OP_WRITE_FIXED, file));
	EXPECT_EQ(0, wrong(out, 0, PAGES, 1003));
	ASSERT_LE(0, take_second_buffer());
	drop_ring();
	map = map_buffer(t.kind, buffers[1], SIZE, PROT_READ | PROT_WRITE);
	ASSERT_NE(NULL, map);
	EXPECT_EQ(0, wrong(map, 0, PAGES, 1003));
	munmap(map, SIZE);
	drop_second_buffer();
	munmap(out, SIZE);
	close(file);
}

/*
 * A pipe holds a page of the memfd, by a plain reference as for a short time: it cannot leave the
 * zone. Nothing stays pinned then, and once the pipe is empty there is no obstacle.
 */
TEST_F(neighbours, a_page_that_cannot_leave_the_zone)
{
	struct iovec iov = { .iov_base = t.mem + SIZE - PAGE, .iov_len = PAGE };
	char page[PAGE];
	int fd[2];

	fill_in_zone(_metadata, 1000);
	ASSERT_EQ(0, pipe(fd));
	ASSERT_EQ((long)PAGE, vmsplice(fd[1], &iov, 1, 0));
	EXPECT_EQ(-ENOMEM, take_first_buffer());
	EXPECT_EQ(t.before.pins, pins());
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1000));
	/* The rest can be had. */
	EXPECT_LE(0, buffers[1] = create(t.memfd, 0, SIZE - t.kind->page));
	close(buffers[1]);
	ASSERT_EQ((long)PAGE, read(fd[0], page, PAGE));
	EXPECT_EQ(0, wrong(page, PAGES - 1, 1, 1000));
	close(fd[0]);
	close(fd[1]);
	ASSERT_LE(0, take_first_buffer());
	EXPECT_EQ(0, take_ring());
	EXPECT_EQ(0, pages_in(t.zone, t.mem, SIZE));
	EXPECT_EQ(0, wrong(t.mem, 0, PAGES, 1000));
	drop_ring();
	drop_first_buffer();
}

/* Two who want to move the same memory at once can be in each other's way, but not for good. */

static const struct holder *neighbour;
static atomic_int go, done;

static void *take_on_go(void *arg)
{
	long *taken = arg;

	for (int i = 1; i <= ROUNDS; i++) {
		while (go < i)
			sched_yield();
		*taken += neighbour->take() >= 0;
		done = i;
	}
	return NULL;
}

TEST_F(neighbours, move_the_same_memory_at_once)
{
	long taken = 0, made = 0;
	pthread_t thread;

	neighbour = &holders[1];
	ASSERT_EQ(0, pthread_create(&thread, NULL, take_on_go, &taken));
	for (int i = 1; i <= ROUNDS; i++) {
		fill_in_zone(_metadata, i);
		go = i;
		if (take_first_buffer() >= 0) {
			made++;
			EXPECT_EQ(0, pages_in(t.zone, t.mem, SIZE));
		} else {
			EXPECT_EQ(-ENOMEM, buffers[0]);
		}
		while (done < i)
			sched_yield();
		EXPECT_EQ(0, wrong(t.mem, 0, PAGES, i));
		neighbour->drop();
		if (buffers[0] >= 0)
			drop_first_buffer();
		/* Now that nobody is in the way. */
		EXPECT_LE(0, take_first_buffer());
		EXPECT_EQ(0, wrong(t.mem, 0, PAGES, i));
		drop_first_buffer();
	}
	pthread_join(thread, NULL);
	printf("# %d rounds: %ld buffers made, %s came %ld times\n", ROUNDS, made,
	       neighbour->name, taken);
	EXPECT_LT(0, made + taken);
}

TEST_HARNESS_MAIN
