/* SPDX-License-Identifier: GPL-2.0 */
/* On which nodes memory is allocated: a mode of linux/mempolicy.h, and nodes as the bits of a mask. */
#ifndef POLICY_H
#define POLICY_H

#include <linux/mempolicy.h>

#define NODES "/sys/devices/system/node/"

static inline long set_policy_of_task(int mode, unsigned long nodes)
{
	return syscall(SYS_set_mempolicy, mode, nodes ? &nodes : NULL, 8 * sizeof(nodes));
}

static inline long set_policy_of_memory(char *mem, size_t size, int mode, unsigned long nodes)
{
	return syscall(SYS_mbind, mem, size, mode, &nodes, 8 * sizeof(nodes), 0);
}

#endif
