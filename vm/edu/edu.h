/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What vm/edu/edu.c offers to programs: /dev/edu0, /dev/edu1, ..., one per device. Each can be
 * open once, and closing it undoes all that was done through it.
 */
#ifndef EDU_H
#define EDU_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* What the device says about itself when it attaches to a buffer. 0: as PCI devices do. */
struct edu_attach {
	__s32 buffer;		/* descriptor of a dma-buf */
	__u32 mask_bits;
	__u32 max_segment;
	__u32 untrusted;	/* the IOMMU layer takes more care then */
	__u64 boundary;		/* a mask */
};

struct edu_segment {
	__u64 address, length;
};

/* Directions, as the kernel numbers them. */
#define EDU_BIDIRECTIONAL	0
#define EDU_TO_DEVICE		1
#define EDU_FROM_DEVICE		2

struct edu_map {
	__u32 direction;
	__u32 count;		/* of @segments: room for so many; then how many there are */
	__u64 segments;		/* of struct edu_segment: where the device finds the buffer */
};

/* Pieces of the buffer, of @count bytes each, from @offset on, @step bytes apart. */
struct edu_transfer {
	__u64 offset, count, step, pieces;
	__u64 data;		/* one piece after the other */
};

#define EDU_ATTACH	_IOW('e', 0, struct edu_attach)
#define EDU_DETACH	_IO('e', 1)
#define EDU_MAP		_IOWR('e', 2, struct edu_map)
#define EDU_UNMAP	_IO('e', 3)
/* The device itself reads, or writes. Nothing is synced. */
#define EDU_READ	_IOW('e', 4, struct edu_transfer)
#define EDU_WRITE	_IOW('e', 5, struct edu_transfer)

#endif
