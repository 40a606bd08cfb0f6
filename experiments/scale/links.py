"""Links between network namespaces with latency and bandwidth, in user space: for kernels without netem.

    sudo python -m experiments.scale.links --delay 10 --mbps 100 fedsplit-host1 fedsplit-host2

Each namespace gets a device `eth0`, whose packets come to this process. The process sends a packet on to the namespace
with the packet's address (`10.77.0.1` is the first one) when the packet would have arrived: links carry one packet
after the other at their bandwidth, and each packet needs the latency besides. TCP above is the kernel's own.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import fcntl
import os
import select
import struct
import time
from collections.abc import Sequence

MTU = 9000
"""Largest packet in bytes. Larger ones than Ethernet's 1,500 keep this process from being the bottleneck."""

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)
_SET_DEVICE = 0x400454CA  # TUNSETIFF of Linux's tun driver
_PLAIN_PACKETS = 0x0001 | 0x1000  # IFF_TUN and IFF_NO_PI: packets of IP, nothing before them
_AT_ONCE = 64


class Link:
    """The way from one host into the network.

    Example:
        >>> link = Link(delay=0.010, bytes_a_second=1e6)
        >>> link.arrival(1000, now=5.0), link.arrival(1000, now=5.0)  # the second packet waits for the first
        (5.011, 5.012)
    """

    def __init__(self, delay: float, bytes_a_second: float) -> None:
        """Takes the latency in seconds and the bandwidth in bytes a second; a bandwidth of 0 is no limit."""
        self._delay = delay
        self._bytes_a_second = bytes_a_second
        self._free_at = 0.0

    def arrival(self, size: int, now: float) -> float:
        """Returns when a packet of `size` bytes arrives that is sent at a time in seconds."""
        seconds = size / self._bytes_a_second if self._bytes_a_second else 0.0
        self._free_at = max(self._free_at, now) + seconds
        return round(self._free_at + self._delay, 9)


def device_in(namespace: str) -> int:
    """Makes the device `eth0` in a network namespace; returns the descriptor from which its packets are read."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _SET_DEVICE, struct.pack("16sH22x", b"eth0", _PLAIN_PACKETS))
    finally:
        libc.setns(home, _NEW_NETWORK)
        os.close(there)
        os.close(home)
    return device


def receiver(packet: bytes) -> int | None:
    """Returns the number of the host to which a packet goes, from 0; None for what is no IPv4 packet.

    Example:
        >>> receiver(bytes([0x45, *bytes(15), 10, 77, 0, 2]))
        1
    """
    is_version_4 = len(packet) >= 20 and packet[0] >> 4 == 4
    return packet[19] - 1 if is_version_4 else None


def carry(devices: Sequence[int], links: Sequence[Link]) -> None:
    """Carries packets until the process is ended.

    Args:
        devices: Descriptors of the hosts' devices.
        links: The way of each host into the network.
    """
    # One queue a link: packets of a link arrive in the order in which they were sent.
    queues: list[collections.deque[tuple[float, int, bytes]]] = [collections.deque() for _ in devices]
    while True:
        dues = [queue[0][0] for queue in queues if queue]
        patience = max(0.0, min(dues) - time.monotonic()) if dues else None
        ready, _, _ = select.select(devices, [], [], patience)
        for device in ready:
            number = devices.index(device)
            with contextlib.suppress(BlockingIOError):
                for _ in range(_AT_ONCE):
                    packet = os.read(device, MTU + 100)
                    target = receiver(packet)
                    if target is not None and 0 <= target < len(devices):
                        due = links[number].arrival(len(packet), time.monotonic())
                        queues[number].append((due, target, packet))
        now = time.monotonic()
        for queue in queues:
            while queue and queue[0][0] <= now:
                _, target, packet = queue.popleft()
                with contextlib.suppress(BlockingIOError, OSError):  # a full device drops packets, as real ones do
                    os.write(devices[target], packet)


def main() -> None:
    """Makes the devices, says so, and carries packets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("namespaces", nargs="+", help="network namespaces, in the order of their addresses")
    parser.add_argument("--delay", type=float, default=0.0, help="latency of a packet in ms")
    parser.add_argument("--mbps", type=float, default=0.0, help="bandwidth of each host's way in, Mbit/s; 0: no limit")
    args = parser.parse_args()
    devices = [device_in(name) for name in args.namespaces]
    links = [Link(args.delay / 1000, args.mbps * 1e6 / 8) for _ in devices]
    print("ready", flush=True)
    carry(devices, links)


if __name__ == "__main__":
    main()
