#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The demo's part in the VM that plays the host: does what README says under "Use it
with QEMU", and so runs Debian's QEMU with a virtio-gpu whose framebuffer is a blob; checks
the guest's screen, the way the memory took, and what the kernel says and gets back.
usage: demo/host.py on|off (hugetlb)"""

import collections
import grp
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

OUT = "/out"
RUN = "/run/demo"  # QEMU's own
README = os.path.join(os.path.dirname(__file__), "../README.md")
RULE = "/etc/udev/rules.d/70-udmabuf.rules"
USER = 65534  # nobody, who is in the group that the rule names
WIDTH, HEIGHT = 1280, 800
HUGETLB = sys.argv[1] == "on"
MARK = "demo: starts here"
# What a kernel says of its clock when the emulator is kept waiting by a busy machine, and of what a
# guest's kernel looks for in its CPU.
HARMLESS = re.compile(r"hrtimer: interrupt took|"
                      r"Unhandled WRMSR\(0xc0010007\)|user requested TSC rate below hardware speed")
BOOT_TIMEOUT = 300

start = time.monotonic()
failed = 0


def say(text):
    print(f"  [{time.monotonic() - start:4.0f} s] {text}", flush=True)


def check(held, text):
    """One line of the summary; returns whether it held."""
    global failed
    failed += not held
    print(f"  {'yes' if held else ' NO'}  {text}", flush=True)
    return held


def read(path):
    with open(path) as file:
        return file.read()


def recipe(first):
    """The command or rule in README that begins so, its continuation lines with it."""
    found = re.search(r"^    (" + re.escape(first) + r"(?:.*\\\n)*.*)", read(README), re.M)
    return found.group(1).replace("\\\n", " ")


def let_udev_set_permissions():
    """By README's rule, whoever is in its group may open /dev/udmabuf, others may not."""
    rule = recipe('KERNEL=="udmabuf"')
    os.makedirs(os.path.dirname(RULE), exist_ok=True)
    with open(RULE, "w") as file:
        file.write(rule + "\n")
    subprocess.run(["/lib/systemd/systemd-udevd", "--daemon"], check=True)
    subprocess.run(["udevadm", "trigger", "--settle", "/sys/class/misc/udmabuf"], check=True)
    group = grp.getgrnam(re.search('GROUP="([a-z]+)"', rule).group(1))
    is_now = os.stat("/dev/udmabuf")
    check((is_now.st_gid, is_now.st_mode & 0o777) == (group.gr_gid, 0o660),
          f"/dev/udmabuf is for the group {group.gr_name}, by README's rule for udev")
    return group.gr_gid


def qemu_options():
    """README's command, for the memory that is asked for, and what else the demo needs."""
    options = shlex.split(recipe("qemu-system-x86_64 "))
    for i, option in enumerate(options):
        if not HUGETLB:
            options[i] = option.replace(",hugetlb=on", "")
        if option.startswith("virtio-gpu-pci"):
            options[i] += f",xres={WIDTH},yres={HEIGHT}"
    return options + [
        # 7.3's small kernel has no interrupt controllers for guests: QEMU brings its own.
        "-accel", "kvm,kernel-irqchip=split", "-no-reboot",
        "-nodefaults", "-no-user-config", "-display", "none",
        "-kernel", RUN + "/bzImage", "-initrd", RUN + "/initramfs",
        "-append", "console=ttyS0 panic=-1 vt.global_cursor_default=0 initcall_blacklist=vkms_init "
                   "nohz=off highres=off",
        "-serial", f"file:{RUN}/guest.log",
        "-serial", f"unix:{RUN}/guest,server=on,wait=off",
        "-qmp", f"unix:{RUN}/qmp,server=on,wait=off"]


def counters():
    """Pins held, and the huge pages free and reserved."""
    read("/proc/sys/vm/stat_refresh")
    vm = dict(line.split() for line in read("/proc/vmstat").splitlines())
    mem = dict(re.findall(r"(\w+): +(\d+)", read("/proc/meminfo")))
    return {
        "pins": int(vm["nr_foll_pin_acquired"]) - int(vm["nr_foll_pin_released"]),
        "free huge pages": int(mem["HugePages_Free"]),
        "reserved huge pages": int(mem["HugePages_Rsvd"]),
    }


def kernel_log():
    """What the host's kernel said above level notice since the demo began."""
    log = subprocess.run(["dmesg", "--level=emerg,alert,crit,err,warn"],
                         capture_output=True, text=True, check=True).stdout
    return [line for line in log.rpartition(MARK)[2].splitlines()[1:]
            if not HARMLESS.search(line)]


class Peer:
    """One of QEMU's sockets, read by the line."""

    def __init__(self, path, qemu):
        self.socket = socket.socket(socket.AF_UNIX)
        for _ in range(600):
            try:
                self.socket.connect(path)
                break
            except OSError:
                if qemu.poll() is not None:
                    sys.exit("QEMU did not start: " + read(OUT + "/qemu.log"))
                time.sleep(0.1)
        self.file = self.socket.makefile("r")

    def line(self, timeout):
        self.socket.settimeout(timeout)
        return self.file.readline()

    def words(self):
        try:
            return self.line(BOOT_TIMEOUT).split()
        except TimeoutError:
            return []

    def send(self, text):
        self.socket.sendall(text.encode() + b"\n")

    def command(self, name, **arguments):
        """A QMP command; events that come before its answer are skipped."""
        self.send(json.dumps({"execute": name, "arguments": arguments}))
        while True:
            answer = json.loads(self.line(60))
            if "error" in answer:
                sys.exit(f"QEMU refuses {name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


def screen(qmp, path):
    """The guest's screen in the framebuffer's format (blue, green, red, zero)."""
    qmp.command("screendump", filename=RUN + "/screen")
    shutil.copyfile(RUN + "/screen", path)
    with open(path, "rb") as file:
        magic, size, depth, rgb = file.read().split(b"\n", 3)
    if (magic, depth) != (b"P6", b"255"):
        sys.exit(f"QEMU wrote a screen of an unknown kind: {magic} {depth}")
    pixels = bytearray(4 * len(rgb) // 3)
    for colour in range(3):
        pixels[2 - colour::4] = rgb[colour::3]
    return size.decode(), bytes(pixels)


def check_screen(qmp, number, checksum):
    with open(f"{OUT}/{number}", "rb") as file:
        picture = file.read()
    # The guest may still be sending its last change to the screen.
    for _ in range(10):
        size, pixels = screen(qmp, f"{OUT}/screen{number}.ppm")
        same = hashlib.md5(pixels).hexdigest() == checksum
        if same:
            break
        time.sleep(1)
    wrong = 0 if pixels.startswith(picture) else sum(
        picture[i:i + 4] != pixels[i:i + 4] for i in range(0, len(picture), 4))
    check(size == f"{WIDTH} {HEIGHT}" and not wrong,
          f"picture {number} is on the screen ({wrong} of {len(picture) // 4} pixels differ)")
    check(same and any(pixels[len(picture):]),
          "so is the text below it, and the screen is what the guest's /dev/fb0 holds")


def check_way(qemu, before):
    """The framebuffer went through udmabuf, and through no fallback."""
    maps = [line for line in read(f"/proc/{qemu.pid}/maps").splitlines() if "/dmabuf" in line]
    info = read("/sys/kernel/debug/dma_buf/bufinfo")
    buffers = [line.split() for line in info.splitlines() if re.search(r"\sudmabuf\s", line)]
    mapped = sum(int(b, 16) - int(a, 16) for a, b in
                 (line.split()[0].split("-") for line in maps))
    check(buffers, f"{len(buffers)} dma-buf(s) of exporter udmabuf, "
                   f"{sum(int(b[0]) for b in buffers) >> 10} KiB")
    check(mapped >= WIDTH * HEIGHT * 4, f"QEMU maps {mapped >> 10} KiB of dma-buf")
    pins = counters()["pins"] - before["pins"]
    check(pins > 0, f"{pins} pins hold the guest's memory")


def main():
    kind = "hugetlb memory" if HUGETLB else "shmem"
    group = let_udev_set_permissions()
    if HUGETLB:
        # As sysctl does it, which is in a package of its own.
        setting, pages = recipe("sysctl ").split()[1].split("=")
        with open("/proc/sys/" + setting.replace(".", "/"), "w") as file:
            file.write(pages)
    os.mkdir(RUN)
    os.chown(RUN, USER, group)
    # systemd's own rules give this to those who sit at a machine.
    os.chmod("/dev/kvm", 0o666)
    for name in ("bzImage", "initramfs"):
        shutil.copyfile(f"{OUT}/{name}", f"{RUN}/{name}")
    with open("/dev/kmsg", "w") as file:
        file.write("<4>" + MARK + "\n")
    before = counters()

    say(f"host: Linux {os.uname().release}; starting the guest on {kind}")
    with open(OUT + "/qemu.log", "w") as log:
        qemu = subprocess.Popen(qemu_options(), stdout=log, stderr=subprocess.STDOUT,
                                user=USER, group=USER, extra_groups=[group])
    qmp = Peer(RUN + "/qmp", qemu)
    qmp.line(60)
    qmp.command("qmp_capabilities")
    guest = Peer(RUN + "/guest", qemu)

    for number in (1, 2, 3):
        word = guest.words()
        if not check(word[:2] == ["drawn", str(number)], f"the guest drew picture {number}"):
            print("       its log is guest.log, QEMU's is qemu.log")
            qemu.kill()
            break
        say("taking the screen")
        check_screen(qmp, number, word[2])
        check_way(qemu, before)
        say("the guest loads its display driver anew")
        guest.send("go on")
        guest.words()
        if kernel_log():
            say(f"the host's kernel log has {len(kernel_log())} lines above level notice")

    try:
        check(qemu.wait(120) == 0, "the guest powered off, QEMU ended well")
    except subprocess.TimeoutExpired:
        qemu.kill()
        qemu.wait()
        check(False, "the guest powered off, QEMU ended well")
    shutil.copyfile(RUN + "/guest.log", OUT + "/guest.log")
    # The last references to a file may be dropped a moment after its process is gone.
    for _ in range(20):
        after = counters()
        if after == before:
            break
        time.sleep(0.5)
    for name, value in before.items():
        check(after[name] == value, f"{name} as before: {value}"
              + ("" if after[name] == value else f", now {after[name]}"))

    log = kernel_log()
    check(not log, "the host's kernel log is empty above level notice"
          + (f": it has {len(log)} lines" if log else ""))
    kinds = collections.Counter(
        re.sub(r"^\[[^]]*\] |\s+(pte|pfn|page):.*", "", line)
        for line in [line for line in log if "BUG:" in line] or log)
    for text, count in kinds.most_common(5):
        print(f"       {count:4} x {text}")

    print()
    if failed:
        print(f"{failed} of the demo's points did not hold on this kernel.")
    else:
        print(f"All of it held: the guest's framebuffer on {kind}, through udmabuf.")
    return failed != 0


sys.exit(main())
