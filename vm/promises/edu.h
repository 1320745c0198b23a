/* SPDX-License-Identifier: GPL-2.0 */
/*
 * QEMU's device edu, as an importer of buffers: vm/edu is its driver, a module, and its device nodes are
 * /dev/edu0, /dev/edu1. It has one buffer at a time.
 */
#ifndef PROMISE_EDU_H
#define PROMISE_EDU_H

#include "promise.h"
#include "../edu/edu.h"

static inline bool machine_has(const char *parameter)
{
	char line[1024] = "";
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);

	if (read(fd, line, sizeof(line) - 1) < 0)
		line[0] = 0;
	close(fd);
	return strstr(line, parameter);
}

/* A descriptor, or a negative errno. The first call loads the module. */
static inline int edu_open(unsigned int edu)
{
	char path[] = "/dev/edu0";
	int fd;

	if (access(path, F_OK)) {
		fd = open("edu.ko", O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return -errno;
		if (syscall(SYS_finit_module, fd,
			    machine_has("edu.noncoherent=1") ? "noncoherent=1" : "", 0)) {
			close(fd);
			return -errno;
		}
		close(fd);
	}
	path[8] = '0' + edu;
	fd = open(path, O_RDWR | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static inline int edu_attach(int edu, int buffer)
{
	struct edu_attach arg = { .buffer = buffer, .mask_bits = 32 };

	return ioctl(edu, EDU_ATTACH, &arg) ? -errno : 0;
}

static inline int edu_map(int edu, unsigned int direction)
{
	struct edu_map arg = { .direction = direction };

	return ioctl(edu, EDU_MAP, &arg) ? -errno : 0;
}

static inline int edu_attach_and_map(int edu, int buffer, unsigned int direction)
{
	return edu_attach(edu, buffer) ?: edu_map(edu, direction);
}

/* Also ends its mapping. */
static inline int edu_detach(int edu)
{
	return ioctl(edu, EDU_DETACH) ? -errno : 0;
}

#endif
