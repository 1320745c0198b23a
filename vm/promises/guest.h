/* SPDX-License-Identifier: GPL-2.0 */
/* For the programs that run a virtual machine of a few instructions in a buffer. */
#ifndef GUEST_H
#define GUEST_H

#include <linux/kvm.h>

#include "promise.h"

#define CODE 0x1000
#define INPUT 0x2000
#define OUTPUT 0x3000
#define PORT 0x10

/* Real mode: OUTPUT becomes what INPUT is, and one more; so does what goes to PORT. */
static const unsigned char increment[] = {
	0xa0, INPUT & 0xff, INPUT >> 8,		/* mov al, [INPUT] */
	0xfe, 0xc0,				/* inc al */
	0xa2, OUTPUT & 0xff, OUTPUT >> 8,	/* mov [OUTPUT], al */
	0xe6, PORT,				/* out PORT, al */
};

/* Returns what the guest sent to PORT; negative: an errno, or minus what KVM gave up for. */
static int run_at(int vcpu, struct kvm_run *run)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };

	if (ioctl(vcpu, KVM_GET_SREGS, &sregs))
		return -errno;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs) ||
	    ioctl(vcpu, KVM_RUN, 0))
		return -errno;
	if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT)
		return -1000 - (int)run->exit_reason;
	return *((unsigned char *)run + run->io.data_offset);
}

/*
 * Runs a guest whose memory is this, from address 0 on, and returns what it sent to PORT. In @huge, unless
 * it is NULL, how many huge pages KVM mapped into it.
 */
static int run_guest_in(struct __test_metadata *_metadata, const char *mem, size_t size, __u32 flags,
			long *huge)
{
	struct kvm_userspace_memory_region memory = {
		.flags = flags, .memory_size = size, .userspace_addr = (uintptr_t)mem,
	};
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, vcpu, ret;
	struct kvm_run *run;
	long room;

	ASSERT_LE(0, kvm);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	ASSERT_LE(0, vm);
	ASSERT_EQ(0, ioctl(vm, KVM_SET_USER_MEMORY_REGION, &memory));
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	ASSERT_LE(0, vcpu);
	room = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	run = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	ASSERT_NE(MAP_FAILED, run);
	ret = run_at(vcpu, run);
	if (huge)
		*huge = value_of("/sys/kernel/debug/kvm/pages_2m", "");
	munmap(run, room);
	close(vcpu);
	close(vm);
	close(kvm);
	return ret;
}

#endif
