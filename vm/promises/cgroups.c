// SPDX-License-Identifier: GPL-2.0
/*
 * Promise: what a task makes the kernel allocate by UDMABUF_CREATE is charged to the cgroup of
 * that task, until it is freed: the holes that are filled, in the memory and in the hugetlb
 * controller, and what the driver keeps about a buffer. A limit that is reached fails the create,
 * or has the task killed, and leaves nothing.
 *
 * Who is affected otherwise: everybody else on a machine that runs containers. One that may open
 * /dev/udmabuf takes memory that no limit counts, and the OOM killer ends the others.
 *
 * How it is looked for: a child does its work in a cgroup of its own, whose counters tell what it
 * was charged. Counters are gathered every two seconds, and in batches: so sizes are such that the
 * rounding does not matter, and a case waits until a number is there, and not for a time.
 *
 * VM: MEM=2048 SMP=2 DEVICES=edu
 */

#include "promise.h"
#include "edu.h"

#include <glob.h>
#include <sys/socket.h>

#define ROOT "/sys/fs/cgroup/"
#define GROUP ROOT "promise/"

static struct {
	struct books before;
	int dev;
} t;

static bool set_group(const char *file, const char *value)
{
	char path[128];

	snprintf(path, sizeof(path), GROUP "%s", file);
	return write_file(path, value);
}

static bool set_limit(const char *file, long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%ld", value);
	return set_group(file, text);
}

static long group_value(const char *file, const char *key)
{
	char path[128];

	snprintf(path, sizeof(path), GROUP "%s", file);
	return value_of(path, key);
}

static bool join_group(void)
{
	return set_group("cgroup.procs", "0");
}

FIXTURE(cgroup) {
};

FIXTURE_SETUP(cgroup)
{
	ASSERT_TRUE(write_file(ROOT "cgroup.subtree_control", "+memory +hugetlb"));
	ASSERT_EQ(0, mkdir(GROUP, 0755));
	ASSERT_TRUE(set_limit("memory.swap.max", 0));
	ASSERT_TRUE(write_number(PARAMETERS "size_limit_mb", 1 << 20));
	ASSERT_TRUE(write_number(PARAMETERS "list_limit", 1 << 16));
	t.dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	ASSERT_GE(t.dev, 0);
	t.before = read_books();
}

/* A cgroup cannot go while a page of it is charged, so this is part of the books. */
FIXTURE_TEARDOWN(cgroup)
{
	int tries;

	EXPECT_SAME_BOOKS(t.before);
	EXPECT_EQ(0, group_value("hugetlb.2MB.current", ""));
	for (tries = 0; rmdir(GROUP) && tries < 500; tries++)
		usleep(10000);
	EXPECT_GT(500, tries);
	write_file(ROOT "cgroup.subtree_control", "-memory -hugetlb");
	write_number(PARAMETERS "size_limit_mb", 64);
	write_number(PARAMETERS "list_limit", 1024);
	write_file(THP_SETTING, "never");
}

/* Waits until a number of the cgroup is in a range; returns the last that was read. */
static long wait_for(const char *file, const char *key, long low, long high)
{
	long value = group_value(file, key);

	for (int tries = 0; (value < low || value > high) && tries < 600; tries++) {
		usleep(10000);
		value = group_value(file, key);
	}
	return value;
}

#define EXPECT_CHARGE(file, key, low, high) do { \
	long charge_ = wait_for(file, key, low, high); \
	EXPECT_LE(low, charge_); \
	EXPECT_GE(high, charge_); \
} while (0)

/*
 * A child that does @work in the cgroup, then tells what it returned and keeps what it has until
 * it is told to end. 1: it is gone.
 */
struct worker {
	pid_t pid;
	int to, from;
};

static void start_worker(struct __test_metadata *_metadata, struct worker *worker,
			 int (*work)(void *), void *arg)
{
	int to[2], from[2], ret;
	char c;

	ASSERT_EQ(0, pipe2(to, O_CLOEXEC));
	ASSERT_EQ(0, pipe2(from, O_CLOEXEC));
	worker->pid = fork();
	ASSERT_GE(worker->pid, 0);
	if (!worker->pid) {
		close(to[1]);
		close(from[0]);
		/* First told to begin, once its own memory is charged, and seen. */
		ret = join_group() ? 0 : -errno;
		if (write(from[1], &ret, sizeof(ret)) != sizeof(ret) || read(to[0], &c, 1) != 1)
			_exit(1);
		ret = work(arg);
		if (write(from[1], &ret, sizeof(ret)) != sizeof(ret))
			_exit(2);
		_exit(read(to[0], &c, 1) != 0);
	}
	close(to[0]);
	close(from[1]);
	worker->to = to[1];
	worker->from = from[0];
	ret = -1;
	EXPECT_EQ((ssize_t)sizeof(ret), read(worker->from, &ret, sizeof(ret)));
	EXPECT_EQ(0, ret);
}

static int run_worker(struct worker *worker)
{
	int ret;

	if (write(worker->to, "", 1) != 1 || read(worker->from, &ret, sizeof(ret)) != sizeof(ret))
		return 1;
	return ret;
}

/* Returns how it ended, as waitpid() tells. */
static int end_worker(struct worker *worker)
{
	int status = -1;

	close(worker->to);
	close(worker->from);
	waitpid(worker->pid, &status, 0);
	return status;
}

/* Holes */

struct job {
	int memfd, dev;
	size_t size;
	struct udmabuf_create_list *list;
	int buffers;		/* made of the list */
	int edu;		/* maps what is created, unless 0 */
};

static int fill_holes(void *arg)
{
	struct job *job = arg;

	return create_at(t.dev, job->memfd, 0, job->size);
}

/* The memfd is somebody else's: who fills the hole pays. */
static void check_holes_charged(struct __test_metadata *_metadata, const struct kind *kind,
				const char *file, const char *key)
{
	struct job job = { .size = 48 * MIB, .memfd = new_memfd(kind, 48 * MIB) };
	struct worker worker;
	long before;

	ASSERT_GE(job.memfd, 0);
	start_worker(_metadata, &worker, fill_holes, &job);
	before = group_value(file, key);
	EXPECT_LT(1, run_worker(&worker));
	EXPECT_CHARGE(file, key, before + (long)job.size, before + (long)(job.size + MIB));
	EXPECT_EQ(0, end_worker(&worker));
	/* The pages are the file's, and stay charged. */
	EXPECT_LE((long)job.size, group_value(file, key));
	close(job.memfd);
	EXPECT_CHARGE(file, key, 0L, (long)MIB);
}

TEST_F(cgroup, holes_of_shmem_are_charged)
{
	check_holes_charged(_metadata, &shmem, "memory.stat", "shmem ");
}

TEST_F(cgroup, holes_of_shmem_thp_are_charged)
{
	check_holes_charged(_metadata, &shmem_thp, "memory.stat", "shmem ");
}

TEST_F(cgroup, holes_of_hugetlb_are_charged)
{
	check_holes_charged(_metadata, &hugetlb, "hugetlb.2MB.current", "");
}

/* Holes that do not fit */

static void check_too_many_holes(struct __test_metadata *_metadata, const struct kind *kind)
{
	struct job job = { .size = 96 * MIB, .memfd = new_memfd(kind, 96 * MIB) };
	struct worker worker;
	int ret, status;

	ASSERT_GE(job.memfd, 0);
	ASSERT_TRUE(set_limit("memory.max", 64 * MIB));
	start_worker(_metadata, &worker, fill_holes, &job);
	quiet_kernel();
	ret = run_worker(&worker);
	EXPECT_EQ(0, complaints());
	/* Nobody but the task itself could be killed to make room. */
	EXPECT_TRUE(ret == 1 || ret == -ENOMEM) TH_LOG("create returned %d", ret);
	EXPECT_EQ(t.before.pins, pins());
	status = end_worker(&worker);
	EXPECT_EQ(ret == 1 ? SIGKILL : 0, status);
	EXPECT_GE(64 * (long)MIB, group_value("memory.current", ""));
	TH_LOG("the task %s", ret == 1 ? "was killed" : "got ENOMEM");
	close(job.memfd);
}

TEST_F(cgroup, holes_of_shmem_over_the_limit)
{
	check_too_many_holes(_metadata, &shmem);
}

TEST_F(cgroup, holes_of_shmem_thp_over_the_limit)
{
	check_too_many_holes(_metadata, &shmem_thp);
}

/* What a failed create filled stays in the file, as a failed write leaves what it wrote. */
TEST_F(cgroup, holes_of_hugetlb_over_the_limit)
{
	struct job job = { .size = 32 * MIB, .memfd = new_memfd(&hugetlb, 32 * MIB) };
	struct worker worker;
	struct books now;

	ASSERT_GE(job.memfd, 0);
	ASSERT_TRUE(set_limit("hugetlb.2MB.max", 16 * MIB));
	start_worker(_metadata, &worker, fill_holes, &job);
	EXPECT_EQ(-ENOMEM, run_worker(&worker));
	now = read_books();
	EXPECT_EQ(t.before.pins, now.pins);
	EXPECT_EQ(t.before.rsvd, now.rsvd);
	EXPECT_EQ((long)(16 * MIB / HUGE), t.before.free - now.free);
	EXPECT_EQ(16 * (long)MIB, group_value("hugetlb.2MB.current", ""));
	EXPECT_EQ(0, end_worker(&worker));
	close(job.memfd);
	EXPECT_CHARGE("hugetlb.2MB.current", "", 0L, 0L);
}

/* With a mapping that has reserved all of it: the failed create gives back what it took. */
TEST_F(cgroup, reserved_holes_of_hugetlb_over_the_limit)
{
	struct job job = { .size = 32 * MIB, .memfd = new_memfd(&hugetlb, 32 * MIB) };
	char *mem = map_fd(job.memfd, job.size, PROT_READ | PROT_WRITE);
	struct worker worker;
	struct books now;

	ASSERT_NE(NULL, mem);
	ASSERT_TRUE(set_limit("hugetlb.2MB.max", 16 * MIB));
	start_worker(_metadata, &worker, fill_holes, &job);
	EXPECT_EQ(-ENOMEM, run_worker(&worker));
	now = read_books();
	EXPECT_EQ(t.before.pins, now.pins);
	EXPECT_EQ((long)(16 * MIB / HUGE), now.rsvd - t.before.rsvd);
	EXPECT_EQ((long)(16 * MIB / HUGE), t.before.free - now.free);
	EXPECT_EQ(0, end_worker(&worker));
	munmap(mem, job.size);
	close(job.memfd);
	EXPECT_CHARGE("hugetlb.2MB.current", "", 0L, 0L);
}

/* What the driver keeps about a buffer */

#define ITEMS 8192
#define BUFFERS 64
#define MANY (8 * ITEMS)	/* for the one buffer that edu takes at a time */

/*
 * One page an item, in an order in which no two neighbours lie side by side in memory. After ITEMS,
 * the same again.
 */
static struct udmabuf_create_list *scattered_list(int memfd, size_t items)
{
	struct udmabuf_create_list *list = calloc(1, sizeof(*list) + items * sizeof(*list->list));
	size_t page = 0;

	for (size_t i = 0; list && i < items; i++) {
		list->list[i].memfd = memfd;
		list->list[i].offset = page * PAGE;
		list->list[i].size = PAGE;
		page = (page * 1664525 + 1013904223) & (ITEMS - 1);
	}
	if (list) {
		list->flags = UDMABUF_FLAGS_CLOEXEC;
		list->count = items;
	}
	return list;
}

static int create_lists(void *arg)
{
	struct job *job = arg;
	int buffer, ret = 0;

	for (int i = 0; i < job->buffers && ret >= 0; i++) {
		buffer = ioctl(t.dev, UDMABUF_CREATE_LIST, job->list);
		ret = buffer < 0 ? -errno : 0;
		if (!ret && job->edu)
			ret = edu_attach_and_map(job->edu, buffer, EDU_BIDIRECTIONAL);
	}
	return ret;
}

/*
 * The memory is there, and charged elsewhere: so what is charged is what the driver keeps. That is
 * 16 bytes for each run of memory that is adjacent, here for each page. An entry of a scatter table
 * takes 32.
 */
static void check_metadata_charged(struct __test_metadata *_metadata, int edu)
{
	struct job job = {
		.memfd = new_memfd(&shmem, ITEMS * PAGE), .buffers = edu ? 1 : BUFFERS, .edu = edu,
	};
	long items = edu ? MANY : ITEMS, least = job.buffers * items * (16 + (edu ? 32 : 0));
	long before, machine;
	char *mem = map_fd(job.memfd, ITEMS * PAGE, PROT_READ | PROT_WRITE);
	struct worker worker;

	ASSERT_NE(NULL, mem);
	fill(mem, 0, ITEMS, 1000);
	job.list = scattered_list(job.memfd, items);
	ASSERT_NE(NULL, job.list);
	start_worker(_metadata, &worker, create_lists, &job);
	before = group_value("memory.stat", "kernel ");
	machine = available_kb();
	EXPECT_EQ(0, run_worker(&worker));
	machine = (machine - available_kb()) * (long)KIB;
	EXPECT_CHARGE("memory.stat", "kernel ", before + least, before + least * 5 / 4);
	TH_LOG("%d buffers of %ld items: %ld KiB charged (least %ld), the machine has %ld less",
	       job.buffers, items, (group_value("memory.stat", "kernel ") - before) / (long)KIB,
	       least / (long)KIB, machine / (long)KIB);
	/* What is not charged is little, but where the kernel keeps records of its memory. */
	if (access("/sys/kernel/debug/kmemleak", F_OK))
		EXPECT_GT(least / 4 + (long)MIB,
			  machine - (group_value("memory.stat", "kernel ") - before));
	EXPECT_EQ(0, end_worker(&worker));
	if (edu)
		close(edu);
	EXPECT_CHARGE("memory.stat", "kernel ", 0L, before + (long)(MIB / 2));
	free(job.list);
	munmap(mem, ITEMS * PAGE);
	close(job.memfd);
}

TEST_F(cgroup, metadata_is_charged)
{
	check_metadata_charged(_metadata, 0);
}

TEST_F(cgroup, scatter_table_is_charged)
{
	int edu;

	/* Such a kernel keeps a record of each mapping, which it charges to nobody. */
	if (dma_is_debugged())
		SKIP(return, "this kernel debugs DMA");
	edu = edu_open(0);
	ASSERT_LT(0, edu);
	check_metadata_charged(_metadata, edu);
}

/* As many as a limit allows: the next fails with an errno, or the task is killed. */
TEST_F(cgroup, metadata_over_the_limit)
{
	struct job job = { .memfd = new_memfd(&shmem, ITEMS * PAGE), .buffers = BUFFERS };
	char *mem = map_fd(job.memfd, ITEMS * PAGE, PROT_READ | PROT_WRITE);
	struct worker worker;
	int ret, status;

	ASSERT_NE(NULL, mem);
	fill(mem, 0, ITEMS, 1000);
	job.list = scattered_list(job.memfd, ITEMS);
	ASSERT_NE(NULL, job.list);
	start_worker(_metadata, &worker, create_lists, &job);
	ASSERT_TRUE(set_limit("memory.max", group_value("memory.current", "") + 2 * MIB));
	quiet_kernel();
	ret = run_worker(&worker);
	EXPECT_EQ(0, complaints());
	EXPECT_TRUE(ret == 1 || ret == -ENOMEM) TH_LOG("create returned %d", ret);
	status = end_worker(&worker);
	EXPECT_EQ(ret == 1 ? SIGKILL : 0, status);
	TH_LOG("the task %s", ret == 1 ? "was killed" : "got ENOMEM");
	free(job.list);
	munmap(mem, ITEMS * PAGE);
	close(job.memfd);
}

/* The buffer itself is within the limit, with the table of a device it is not. */
TEST_F(cgroup, scatter_table_over_the_limit)
{
	struct job job = {
		.memfd = new_memfd(&shmem, ITEMS * PAGE), .buffers = 1, .edu = edu_open(0),
	};
	char *mem = map_fd(job.memfd, ITEMS * PAGE, PROT_READ | PROT_WRITE);
	struct worker worker;
	int ret, status;

	ASSERT_LT(0, job.edu);
	ASSERT_NE(NULL, mem);
	fill(mem, 0, ITEMS, 1000);
	job.list = scattered_list(job.memfd, MANY);
	ASSERT_NE(NULL, job.list);
	start_worker(_metadata, &worker, create_lists, &job);
	/* 1 MiB of runs, which have to move once, and 2 MiB of table. */
	ASSERT_TRUE(set_limit("memory.max", group_value("memory.current", "") + 5 * (long)MIB / 2));
	quiet_kernel();
	ret = run_worker(&worker);
	EXPECT_EQ(0, complaints());
	EXPECT_TRUE(ret == 1 || ret == -ENOMEM) TH_LOG("create and map returned %d", ret);
	status = end_worker(&worker);
	EXPECT_EQ(ret == 1 ? SIGKILL : 0, status);
	close(job.edu);
	free(job.list);
	munmap(mem, ITEMS * PAGE);
	close(job.memfd);
}

/*
 * A task that means harm, with 64 MiB: it makes buffers in threads, of holes and of lists, syncs
 * them and maps them into itself, keeps the descriptors or sends them to itself through a socket, and goes on as
 * long as anything works. What is not charged to it is seen in what the machine has left.
 */

#define HOSTILE_LIMIT (64 * MIB)
#define HOSTILE_THREADS 3
#define HOSTILE_ROUNDS 400
/*
 * What may shrink outside: the counting is coarse, and the task's own kernel stacks and sockets are
 * there. So is what vmalloc() keeps about an area, and its page tables: up to a 60th of what it gives,
 * as seen here. A kernel that debugs itself keeps records of its own, charged to nobody; of each small
 * object, too, so that with many of these it has no bound.
 */
#define UNCHARGED ((dma_is_debugged() ? 7 : 2) * (long)MIB)
#define UNCHARGED_SMALL (dma_is_debugged() ? LONG_MAX / 2 : (long)MIB)

static struct hostile {
	struct udmabuf_create_list *list;
	int socket[2];
	atomic_int made;
} hostile;

/* In flight, a descriptor belongs to nobody. */
static void send_away(int fd)
{
	char control[CMSG_SPACE(sizeof(fd))] = { 0 }, byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	if (sendmsg(hostile.socket[0], &msg, MSG_DONTWAIT) == 1)
		close(fd);
}

static void *hostile_thread(void *arg)
{
	int buffer, memfd, failed = 0;
	char *map;

	for (int i = 0; i < HOSTILE_ROUNDS && failed < 20; i++) {
		if (i % 4 == 3) {
			memfd = memfd_create("hostile", MFD_ALLOW_SEALING);
			if (memfd < 0 || ftruncate(memfd, MIB) ||
			    fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK))
				buffer = -1;
			else
				buffer = create_at(t.dev, memfd, 0, MIB);
		} else {
			buffer = ioctl(t.dev, UDMABUF_CREATE_LIST, hostile.list);
		}
		if (buffer < 0) {
			failed++;
			continue;
		}
		atomic_fetch_add(&hostile.made, 1);
		sync_buffer(buffer, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW);
		map = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, buffer, 0);
		if (map != MAP_FAILED)
			memset(map, 0, MIB);
		if (i % 2)
			send_away(buffer);
	}
	return arg;
}

/* As many buffers of one page as there can be, each with all that belongs to a buffer alone. */
static void *small_hostile_thread(void *arg)
{
	int memfd = memfd_create("hostile", MFD_ALLOW_SEALING), failed = 0;

	if (memfd < 0 || ftruncate(memfd, PAGE) || fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK))
		return arg;
	for (int i = 0; failed < 20; i++) {
		struct dma_buf_export_sync_file out = { .flags = DMA_BUF_SYNC_RW, .fd = -1 };
		struct dma_buf_import_sync_file in = { .flags = DMA_BUF_SYNC_RW };
		int buffer = create_at(t.dev, memfd, 0, PAGE);

		if (buffer < 0) {
			failed++;
			continue;
		}
		atomic_fetch_add(&hostile.made, 1);
		ioctl(buffer, DMA_BUF_SET_NAME_B, (__u64)(uintptr_t)"thirty-one characters fit in it");
		ioctl(buffer, DMA_BUF_IOCTL_EXPORT_SYNC_FILE, &out);
		in.fd = out.fd;
		ioctl(buffer, DMA_BUF_IOCTL_IMPORT_SYNC_FILE, &in);
		sync_buffer(buffer, DMA_BUF_SYNC_START | DMA_BUF_SYNC_RW);
		if (i % 2)
			send_away(buffer);
	}
	return arg;
}

/* @arg is what each thread does. */
static int do_harm(void *arg)
{
	struct rlimit limit = { 65536, 65536 };
	pthread_t threads[HOSTILE_THREADS];
	void *(*thread)(void *) = arg;

	setrlimit(RLIMIT_NOFILE, &limit);
	if (socketpair(AF_UNIX, SOCK_DGRAM, 0, hostile.socket))
		return -errno;
	for (int i = 0; i < HOSTILE_THREADS; i++)
		if (pthread_create(threads + i, NULL, thread, NULL))
			return -errno;
	for (int i = 0; i < HOSTILE_THREADS; i++)
		pthread_join(threads[i], NULL);
	return atomic_load(&hostile.made);
}

/*
 * What is in use and not charged to the cgroup, in bytes. For MemAvailable, the dentries and inodes of
 * buffers would be free memory, which they are not, so here only page cache is.
 */
static long outside(void)
{
	long kb = available_kb() - value_of("/proc/meminfo", "MemAvailable");

	kb += value_of("/proc/meminfo", "MemFree") + value_of("/proc/meminfo", "Active(file)") +
	      value_of("/proc/meminfo", "Inactive(file)");
	return -kb * (long)KIB - group_value("memory.current", "");
}

/* The kernel hoards objects that are free, of each kind some, until it needs their memory. */
static void shrink_slabs(void)
{
	glob_t files;

	if (glob("/sys/kernel/slab/*/shrink", 0, NULL, &files))
		return;
	for (size_t i = 0; i < files.gl_pathc; i++)
		write_file(files.gl_pathv[i], "1");
	globfree(&files);
}

/*
 * The most that was outside while the worker was at it, in two looks one after the other: what the worker
 * takes between the files that one reads, while this CPU is busy elsewhere, is in some of them only.
 */
static long watch(struct worker *worker, int *status)
{
	long most = LONG_MIN, now, last = LONG_MAX, both;
	struct timespec nap = { .tv_nsec = 20000000 };
	int flags = fcntl(worker->from, F_GETFL), ret;
	bool done = false;

	fcntl(worker->from, F_SETFL, flags | O_NONBLOCK);
	for (int looks = 0; !done && looks < 20000; looks++) {
		if (read(worker->from, &ret, sizeof(ret)) == sizeof(ret)) {
			printf("# the hostile task made %d buffers\n", ret);
			done = true;
		} else if (waitpid(worker->pid, status, WNOHANG) == worker->pid) {
			worker->pid = 0;
			break;
		}
		now = outside();
		both = now < last ? now : last;
		last = now;
		/* What a dying task gives back is first uncharged, then free. */
		if (!group_value("memory.events", "oom_kill "))
			most = both > most ? both : most;
		nanosleep(&nap, NULL);
	}
	return most;
}

static void check_hostile(struct __test_metadata *_metadata, void *(*thread)(void *), long uncharged)
{
	int memfd = new_memfd(&shmem, ITEMS * PAGE), status = 0;
	char *mem = map_fd(memfd, ITEMS * PAGE, PROT_READ | PROT_WRITE);
	struct worker worker;
	long before, most;

	ASSERT_NE(NULL, mem);
	fill(mem, 0, ITEMS, 1000);
	hostile.list = scattered_list(memfd, ITEMS);
	ASSERT_NE(NULL, hostile.list);
	ASSERT_TRUE(set_limit("memory.max", HOSTILE_LIMIT));
	start_worker(_metadata, &worker, do_harm, thread);
	before = outside();
	quiet_kernel();
	ASSERT_EQ(1, write(worker.to, "", 1));
	most = watch(&worker, &status);
	EXPECT_EQ(0, complaints());
	EXPECT_GE(uncharged, most - before);
	TH_LOG("beside what it was charged it took %ld KiB at most, and %s",
	       (most - before) / (long)KIB, worker.pid ? "lives" : "was killed");
	if (worker.pid) {
		status = end_worker(&worker);
	} else {
		close(worker.to);
		close(worker.from);
	}
	EXPECT_TRUE(!status || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
	for (int tries = 0; pins() != t.before.pins && tries < 500; tries++)
		usleep(10000);
	EXPECT_EQ(t.before.pins, pins());
	EXPECT_CHARGE("memory.current", "", 0L, 2 * (long)MIB);
	/* What is freed may go by way of RCU. */
	for (int tries = 0; outside() - before > uncharged && tries < 500; tries++) {
		shrink_slabs();
		usleep(10000);
	}
	EXPECT_GE(uncharged, outside() - before);
	free(hostile.list);
	munmap(mem, ITEMS * PAGE);
	close(memfd);
}

TEST_F(cgroup, hostile_task_cannot_take_more)
{
	check_hostile(_metadata, hostile_thread, UNCHARGED);
}

TEST_F(cgroup, hostile_task_with_small_buffers_cannot_take_more)
{
	check_hostile(_metadata, small_hostile_thread, UNCHARGED_SMALL);
}

TEST_HARNESS_MAIN
