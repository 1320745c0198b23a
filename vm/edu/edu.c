// SPDX-License-Identifier: GPL-2.0
/*
 * Lets a program read and write a dma-buf through a device: QEMU's "edu", which copies between
 * memory and 4 KiB of its own, takes 100 ms for it, and shows these 4 KiB only by copying them
 * out again. So each transfer is two copies: between the buffer and the device, and between the
 * device and a page that the CPU reads and writes.
 *
 * This is an importer as drivers are: it attaches and maps, walks the segments that the DMA API
 * made of the scatter table, and never syncs; syncing is what the exporter and the user do.
 */
#include <linux/delay.h>
#include <linux/dma-buf.h>
#include <linux/dma-map-ops.h>
#include <linux/gfp.h>
#include <linux/iopoll.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#include "edu.h"

/* 6.1 takes the reservation lock itself. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
#define dma_buf_map_attachment_unlocked dma_buf_map_attachment
#define dma_buf_unmap_attachment_unlocked dma_buf_unmap_attachment
#endif

static bool noncoherent;
module_param(noncoherent, bool, 0444);
MODULE_PARM_DESC(noncoherent, "The devices see memory only as it was when it was synced for them.");

#define EDU_SRC		0x80
#define EDU_DST		0x88
#define EDU_COUNT	0x90
#define EDU_CMD		0x98
#define EDU_CMD_RUN	BIT(0)
#define EDU_CMD_OUT	BIT(1)	/* from the device to memory */
#define EDU_MEMORY	0x40000
#define EDU_MSEC	100	/* for each copy */
/* QEMU 7.2 aborts if a transfer ends where the device's memory does. */
#define EDU_CHUNK	2048

struct edu {
	struct pci_dev *pdev;
	void __iomem *regs;
	struct miscdevice misc;
	char name[16];
	unsigned long is_open;
	struct mutex lock;	/* the device, and all below */
	void *page;
	dma_addr_t page_addr;
	struct dma_buf_attachment *attachment;
	const struct dma_map_ops *dma_ops;
	struct sg_table *sgt;
	enum dma_data_direction direction;
};

/*
 * With "noncoherent", the device has a copy of its own of what is mapped, which syncing brings up
 * to date, and nothing else. swiotlb is not that strict: it copies when it maps, even with
 * DMA_ATTR_SKIP_CPU_SYNC, where a machine with caches leaves a device what was in memory before.
 */

static void *edu_copy_of(struct scatterlist *sg)
{
	return phys_to_virt(sg_dma_address(sg));
}

/* The copy knows whose it is: with DMABUF_DEBUG, an importer's scatter table has no pages. */
static void *edu_memory_of(struct scatterlist *sg)
{
	return (void *)page_private(virt_to_page(edu_copy_of(sg)));
}

static void edu_sync_for_device(struct device *dev, struct scatterlist *sgl, int nents,
				enum dma_data_direction direction)
{
	struct scatterlist *sg;
	int i;

	if (direction != DMA_FROM_DEVICE)
		for_each_sg(sgl, sg, nents, i)
			memcpy(edu_copy_of(sg), edu_memory_of(sg), sg->length);
}

static void edu_sync_for_cpu(struct device *dev, struct scatterlist *sgl, int nents,
			     enum dma_data_direction direction)
{
	struct scatterlist *sg;
	int i;

	if (direction != DMA_TO_DEVICE)
		for_each_sg(sgl, sg, nents, i)
			memcpy(edu_memory_of(sg), edu_copy_of(sg), sg->length);
}

static void edu_free_copies(struct scatterlist *sgl, int nents)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(sgl, sg, nents, i)
		free_pages_exact(edu_copy_of(sg), sg->length);
}

static int edu_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
		      enum dma_data_direction direction, unsigned long attrs)
{
	gfp_t gfp = dma_get_mask(dev) > DMA_BIT_MASK(32) ? GFP_KERNEL : GFP_KERNEL | GFP_DMA32;
	struct scatterlist *sg;
	int i;

	for_each_sg(sgl, sg, nents, i) {
		void *copy = alloc_pages_exact(sg->length, gfp | __GFP_NOWARN);

		if (!copy) {
			edu_free_copies(sgl, i);
			return -ENOMEM;
		}
		/* What the device does not write has to stay as it is. */
		if (direction == DMA_FROM_DEVICE)
			memcpy(copy, sg_virt(sg), sg->length);
		else
			memset(copy, 0xa5, sg->length);
		set_page_private(virt_to_page(copy), (unsigned long)sg_virt(sg));
		sg_dma_address(sg) = virt_to_phys(copy);
		sg_dma_len(sg) = sg->length;
	}
	if (!(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		edu_sync_for_device(dev, sgl, nents, direction);
	return nents;
}

static void edu_unmap_sg(struct device *dev, struct scatterlist *sgl, int nents,
			 enum dma_data_direction direction, unsigned long attrs)
{
	if (!(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		edu_sync_for_cpu(dev, sgl, nents, direction);
	edu_free_copies(sgl, nents);
}

static const struct dma_map_ops edu_dma_ops = {
	.map_sg = edu_map_sg,
	.unmap_sg = edu_unmap_sg,
	.sync_sg_for_cpu = edu_sync_for_cpu,
	.sync_sg_for_device = edu_sync_for_device,
};

static int edu_attach(struct edu *edu, const struct edu_attach *arg)
{
	struct device *dev = &edu->pdev->dev;
	struct dma_buf *buf;
	int ret;

	if (edu->attachment)
		return -EBUSY;
	/* dma_set_mask() decides by the ops of that time whether syncs of the device are skipped. */
	edu->dma_ops = get_dma_ops(dev);
	if (noncoherent)
		set_dma_ops(dev, &edu_dma_ops);
	ret = dma_set_mask(dev, DMA_BIT_MASK(arg->mask_bits ?: 64));
	if (ret)
		goto err;
	dma_set_max_seg_size(dev, arg->max_segment ?: SZ_64K);
	dma_set_seg_boundary(dev, arg->boundary ?: DMA_BIT_MASK(32));
	edu->pdev->untrusted = arg->untrusted;

	buf = dma_buf_get(arg->buffer);
	if (IS_ERR(buf)) {
		ret = PTR_ERR(buf);
		goto err;
	}
	edu->attachment = dma_buf_attach(buf, dev);
	if (!IS_ERR(edu->attachment))
		return 0;
	ret = PTR_ERR(edu->attachment);
	edu->attachment = NULL;
	dma_buf_put(buf);
err:
	set_dma_ops(dev, edu->dma_ops);
	return ret;
}

static int edu_map(struct edu *edu, struct edu_map __user *user)
{
	struct edu_segment __user *to;
	struct scatterlist *sg;
	struct edu_map arg;
	int i;

	if (!edu->attachment || edu->sgt)
		return -EINVAL;
	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.direction > DMA_FROM_DEVICE)
		return -EINVAL;
	edu->sgt = dma_buf_map_attachment_unlocked(edu->attachment, arg.direction);
	if (IS_ERR(edu->sgt)) {
		i = PTR_ERR(edu->sgt);
		edu->sgt = NULL;
		return i;
	}
	edu->direction = arg.direction;

	to = u64_to_user_ptr(arg.segments);
	for_each_sgtable_dma_sg(edu->sgt, sg, i) {
		struct edu_segment segment = { sg_dma_address(sg), sg_dma_len(sg) };

		if (i < arg.count && copy_to_user(&to[i], &segment, sizeof(segment)))
			return -EFAULT;
	}
	return put_user(edu->sgt->nents, &user->count);
}

static int edu_unmap(struct edu *edu)
{
	if (!edu->sgt)
		return -EINVAL;
	dma_buf_unmap_attachment_unlocked(edu->attachment, edu->sgt, edu->direction);
	edu->sgt = NULL;
	return 0;
}

static int edu_detach(struct edu *edu)
{
	struct dma_buf *buf;

	if (!edu->attachment)
		return -EINVAL;
	edu_unmap(edu);
	buf = edu->attachment->dmabuf;
	dma_buf_detach(buf, edu->attachment);
	dma_buf_put(buf);
	edu->attachment = NULL;
	set_dma_ops(&edu->pdev->dev, edu->dma_ops);
	return 0;
}

static int edu_copy(struct edu *edu, u64 src, u64 dst, u64 count, u32 cmd)
{
	u32 state;

	writeq(src, edu->regs + EDU_SRC);
	writeq(dst, edu->regs + EDU_DST);
	writeq(count, edu->regs + EDU_COUNT);
	writeq(cmd | EDU_CMD_RUN, edu->regs + EDU_CMD);
	msleep(EDU_MSEC);
	return read_poll_timeout(readl, state, !(state & EDU_CMD_RUN), USEC_PER_MSEC,
				 60 * USEC_PER_SEC, false, edu->regs + EDU_CMD);
}

/* Where the device finds byte @pos of the buffer, and in @room how many follow; 0: past the end. */
static dma_addr_t edu_find(struct edu *edu, u64 pos, u64 *room)
{
	struct scatterlist *sg;
	int i;

	for_each_sgtable_dma_sg(edu->sgt, sg, i) {
		if (pos < sg_dma_len(sg)) {
			*room = sg_dma_len(sg) - pos;
			return sg_dma_address(sg) + pos;
		}
		pos -= sg_dma_len(sg);
	}
	*room = 0;
	return 0;
}

/* @size bytes of the data from byte @done on: a copy for each piece, and for each segment of it. */
static int edu_transfer_some(struct edu *edu, const struct edu_transfer *arg, u64 done, u64 size,
			     bool write)
{
	u64 at, room, offset;
	int ret = 0;

	for (at = 0; !ret && at < size; at += room) {
		dma_addr_t addr;

		offset = (done + at) % arg->count;
		addr = edu_find(edu, arg->offset + (done + at) / arg->count * arg->step + offset,
				&room);
		room = min3(room, size - at, arg->count - offset);
		if (!room || fatal_signal_pending(current))
			return room ? -EINTR : -ERANGE;
		ret = write ? edu_copy(edu, EDU_MEMORY + at, addr, room, EDU_CMD_OUT) :
			      edu_copy(edu, addr, EDU_MEMORY + at, room, 0);
	}
	return ret;
}

static int edu_transfer(struct edu *edu, const struct edu_transfer *arg, bool write)
{
	u8 __user *user = u64_to_user_ptr(arg->data);
	u64 done, size;
	int ret = 0;

	if (!edu->sgt || !arg->count)
		return -EINVAL;
	for (done = 0; !ret && done < arg->count * arg->pieces; done += size) {
		size = min_t(u64, arg->count * arg->pieces - done, EDU_CHUNK);
		if (write && copy_from_user(edu->page, user + done, size))
			return -EFAULT;
		if (write)
			ret = edu_copy(edu, edu->page_addr, EDU_MEMORY, size, 0);
		ret = ret ?: edu_transfer_some(edu, arg, done, size, write);
		if (!ret && !write)
			ret = edu_copy(edu, EDU_MEMORY, edu->page_addr, size, EDU_CMD_OUT);
		if (!ret && !write && copy_to_user(user + done, edu->page, size))
			return -EFAULT;
	}
	return ret;
}

static long edu_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct edu *edu = container_of(file->private_data, struct edu, misc);
	void __user *user = (void __user *)arg;
	struct edu_transfer transfer;
	struct edu_attach attach;
	long ret = -EFAULT;

	mutex_lock(&edu->lock);
	switch (cmd) {
	case EDU_ATTACH:
		if (!copy_from_user(&attach, user, sizeof(attach)))
			ret = edu_attach(edu, &attach);
		break;
	case EDU_DETACH:
		ret = edu_detach(edu);
		break;
	case EDU_MAP:
		ret = edu_map(edu, user);
		break;
	case EDU_UNMAP:
		ret = edu_unmap(edu);
		break;
	case EDU_READ:
	case EDU_WRITE:
		if (!copy_from_user(&transfer, user, sizeof(transfer)))
			ret = edu_transfer(edu, &transfer, cmd == EDU_WRITE);
		break;
	default:
		ret = -ENOTTY;
	}
	mutex_unlock(&edu->lock);
	return ret;
}

static int edu_open(struct inode *inode, struct file *file)
{
	struct edu *edu = container_of(file->private_data, struct edu, misc);

	return test_and_set_bit(0, &edu->is_open) ? -EBUSY : 0;
}

static int edu_release(struct inode *inode, struct file *file)
{
	struct edu *edu = container_of(file->private_data, struct edu, misc);

	edu_detach(edu);
	clear_bit(0, &edu->is_open);
	return 0;
}

static const struct file_operations edu_fops = {
	.owner = THIS_MODULE,
	.open = edu_open,
	.release = edu_release,
	.unlocked_ioctl = edu_ioctl,
};

static int edu_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	static int count;
	struct edu *edu = devm_kzalloc(&pdev->dev, sizeof(*edu), GFP_KERNEL);
	int ret;

	if (!edu)
		return -ENOMEM;
	ret = pcim_enable_device(pdev);
	if (!ret)
		ret = pcim_iomap_regions(pdev, BIT(0), "edu");
	if (!ret)
		ret = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(32));
	if (ret)
		return ret;
	edu->page = dmam_alloc_coherent(&pdev->dev, PAGE_SIZE, &edu->page_addr, GFP_KERNEL);
	if (!edu->page)
		return -ENOMEM;
	edu->pdev = pdev;
	edu->regs = pcim_iomap_table(pdev)[0];
	mutex_init(&edu->lock);
	snprintf(edu->name, sizeof(edu->name), "edu%d", count++);
	edu->misc.minor = MISC_DYNAMIC_MINOR;
	edu->misc.name = edu->name;
	edu->misc.fops = &edu_fops;
	pci_set_master(pdev);
	pci_set_drvdata(pdev, edu);
	return misc_register(&edu->misc);
}

static void edu_remove(struct pci_dev *pdev)
{
	struct edu *edu = pci_get_drvdata(pdev);

	misc_deregister(&edu->misc);
}

static const struct pci_device_id edu_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = "edu",
	.id_table = edu_ids,
	.probe = edu_probe,
	.remove = edu_remove,
};
module_pci_driver(edu_driver);

MODULE_DESCRIPTION("QEMU's edu device as an importer of dma-bufs");
MODULE_LICENSE("GPL");
/* The argument of MODULE_IMPORT_NS() became a string in 6.13. */
MODULE_INFO(import_ns, "DMA_BUF");
