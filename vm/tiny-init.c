// SPDX-License-Identifier: GPL-2.0
/*
 * Process 1 of a machine that has no root file system, only an initramfs with this and one test
 * program, both linked statically: for kernels that cannot run this machine's programs. Does what
 * vm/init and vm/selftest do elsewhere: mounts what the program expects, makes huge pages and swap
 * on zram, runs /program, and looks whether every pin and huge page came back.
 *
 * All goes to the console, the kernel's log at the end; the last line tells the status.
 */
#define _GNU_SOURCE

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/wait.h>
#include <unistd.h>

#define KLOG_READ_ALL 3
#define KLOG_SIZE (1 << 20)

static void mount_on(const char *dir, const char *type)
{
	mkdir(dir, 0755);
	if (mount("none", dir, type, 0, NULL))
		printf("# no %s on %s: %m\n", type, dir);
}

static bool write_file(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, value, strlen(value)) == (ssize_t)strlen(value);

	close(fd);
	return ok;
}

/* What mkswap(8) writes: one page that tells how many there are. */
static bool make_swap(const char *path, uint32_t mib)
{
	size_t size = getpagesize();
	uint32_t info[] = { 1 /* version */, (mib << 20) / size - 1 /* last page */, 0 };
	char *header = calloc(1, size);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok;

	memcpy(header + 1024, info, sizeof(info));
	memcpy(header + size - 10, "SWAPSPACE2", 10);
	ok = fd >= 0 && write(fd, header, size) == (ssize_t)size;
	close(fd);
	free(header);
	return ok && !swapon(path, 0);
}

/* Adds the lines of a file that start with @key. */
static void add_lines(char *text, size_t size, const char *path, const char *key)
{
	FILE *f = fopen(path, "re");
	char line[256];

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, key, strlen(key)))
			strncat(text, line, size - strlen(text) - 1);
	if (f)
		fclose(f);
}

static long vmstat(const char *key)
{
	char text[256] = "";

	add_lines(text, sizeof(text), "/proc/vmstat", key);
	return *text ? atol(text + strlen(key)) : 0;
}

static void read_counters(char *text, size_t size)
{
	int fd = open("/proc/sys/vm/stat_refresh", O_RDONLY | O_CLOEXEC);

	/* Each CPU keeps a part of the counters to itself until it is asked. */
	if (fd < 0 || read(fd, text, 1) < 0)
		printf("# no stat_refresh: %m\n");
	close(fd);
	snprintf(text, size, "pins %ld\n",
		 vmstat("nr_foll_pin_acquired ") - vmstat("nr_foll_pin_released "));
	add_lines(text, size, "/proc/meminfo", "HugePages_");
}

static int run(const char *program)
{
	int status = -1;
	pid_t pid = fork();

	if (!pid) {
		execl(program, program, NULL);
		printf("# cannot run %s: %m\n", program);
		_exit(127);
	}
	while (pid > 0 && waitpid(-1, &status, 0) != pid)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int run_and_check(void)
{
	char before[1024], after[1024];
	int rc;

	read_counters(before, sizeof(before));
	rc = run("/program");
	/* The last reference to a file may go a moment after its process. */
	for (int tries = 0; tries < 10; tries++) {
		read_counters(after, sizeof(after));
		if (!strcmp(before, after))
			break;
		usleep(500000);
	}
	if (!strcmp(before, after)) {
		printf("ok pins-and-huge-pages-came-back\n");
	} else {
		printf("not ok pins-and-huge-pages-came-back\nbefore:\n%safter:\n%s", before, after);
		rc = rc ? rc : 1;
	}
	return rc;
}

static void print_kernel_log(void)
{
	static char log[KLOG_SIZE + 1];
	int size = klogctl(KLOG_READ_ALL, log, KLOG_SIZE);

	printf("tiny-init: the kernel's log\n%s\n", size < 0 ? "it cannot be read" : log);
}

int main(void)
{
	int console, rc;

	mkdir("/dev", 0755);
	mount("none", "/dev", "devtmpfs", 0, NULL);
	console = open("/dev/console", O_RDWR);
	for (int fd = 0; console >= 0 && fd < 3; fd++)
		dup2(console, fd);
	setlinebuf(stdout);

	mount_on("/proc", "proc");
	mount_on("/sys", "sysfs");
	mount_on("/sys/kernel/debug", "debugfs");
	mount_on("/sys/fs/cgroup", "cgroup2");
	mount_on("/tmp", "ramfs");
	if (!write_file("/proc/sys/vm/nr_hugepages", "192"))
		printf("# no huge pages\n");
	if (!write_file("/sys/block/zram0/disksize", "512M") || !make_swap("/dev/zram0", 512))
		printf("# no swap\n");

	printf("tiny-init: the program's output\n");
	rc = run_and_check();
	print_kernel_log();
	printf("tiny-init: status %d\n", rc);
	fflush(stdout);
	sleep(1);		/* until the line is out */
	reboot(RB_AUTOBOOT);	/* QEMU's -no-reboot makes it an end */
	return 0;
}
