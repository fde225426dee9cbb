"""Two hosts on this machine: network namespaces with a wire between them, host names of their own, and real sshds."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import REPOSITORY

_SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
_SSH = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    """
    Attributes:
        name: of the host and of its network namespace.
    """

    name: str
    address: str

    def command(self, *words: object) -> list[str]:
        """The command line that runs ``words`` on this host."""
        shell = ["sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", *shell, *map(str, words)]

    def cut_wire(self) -> None:
        ip("-n", self.name, "link", "set", "wire", "down")

    def mend_wire(self) -> None:
        ip("-n", self.name, "link", "set", "wire", "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces that reach each other and nothing else; each calls its end of the wire ``wire``. Needs root."""
    name = f"swin{os.getpid()}"
    hosts = (Host(f"{name}a", "10.77.0.1"), Host(f"{name}b", "10.77.0.2"))
    try:
        for host in hosts:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        ip("-n", hosts[0].name, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", hosts[1].name)
        for host in hosts:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "wire")
            ip("-n", host.name, "link", "set", "wire", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False)


@contextmanager
def reachable_by_ssh(hosts: tuple[Host, Host], folder: Path) -> Iterator[None]:
    """An sshd on each host, which the other's ssh finds by its name; nothing outside the hosts is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    with ExitStack() as stack:
        for number, host in enumerate(hosts):
            # `ip netns exec` shows these in place of /etc/hosts and /etc/ssh.
            own = Path("/etc/netns") / host.name
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            (own / "ssh").mkdir(parents=True)
            (own / "hosts").write_text(names)
            (own / "ssh" / "ssh_config").write_text(_SSH.format(folder=folder))
            config = folder / f"sshd-{host.name}"
            config.write_text(_SSHD.format(folder=folder, address=host.address))
            daemon = subprocess.Popen(
                # A core of its own: a rank that had both would add in another order than two ranks of one host.
                ["taskset", "-c", str(number), *host.command("/usr/sbin/sshd", "-D", "-e", "-f", config)],
                stderr=(folder / f"{host.name}.log").open("wb"),
            )
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        for host in hosts:
            _wait_for_ssh(hosts[0], host)
        yield


def _wait_for_ssh(source: Host, target: Host) -> None:
    end = time.monotonic() + 30
    while subprocess.run(source.command("ssh", target.name, "true"), check=False, capture_output=True).returncode:
        assert time.monotonic() < end, f"{target.name} can't be reached by ssh"
        time.sleep(0.1)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def environment_file(folder: Path) -> Path:
    """What DeepSpeed's runner hands to the ranks on other hosts (it passes few variables on by itself)."""
    path = folder / "deepspeed_env"
    path.write_text(f"DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nOMP_WAIT_POLICY=PASSIVE\nPYTHONPATH={REPOSITORY}\n")
    return path
