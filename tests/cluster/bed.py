"""Hosts on one machine: network namespaces on a bridge, each with its own processes, home, /tmp/ray and sshd.

What is shared is what a laptop and three servers do not share, but for the file system beneath: each host sees its own
processes alone (`ray stop` on one does not stop another's), has a host name, an address in 10.77.0.0/24 and no way out
but the bridge. Python comes from the environment that runs the tests: `~/venv` of a host is an environment of its own
that finds every dependency there, so that `pip install` of the wheel fetches nothing.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.guide import REPOSITORY

BRIDGE = "dfkdbr0"
LAPTOP = "10.77.0.1"
HOME = Path(pwd.getpwuid(0).pw_dir)
TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "unshare": "util-linux"}


def missing() -> str | None:
    """Why there can be no bed on this machine, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    lacking = [package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)]
    if lacking:
        return f"apt-get install {' '.join(lacking)}"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def run(*words: str, check: bool = True) -> str:
    """Run a command; returns what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": path_of()})
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def path_of() -> str:
    """PATH with the places where system tools lie."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass
class Host:
    """One host; `root` holds all its files."""

    name: str
    address: str
    root: Path
    process: subprocess.Popen | None = None

    @property
    def home(self) -> Path:
        """Its home folder, as seen from outside."""
        return self.root / "home"

    def boot(self, authorized: Path, exports: dict[str, str]) -> None:
        """Start it: namespaces, network, sshd."""
        link = f"dfkd-{self.name}"
        run("ip", "netns", "add", link)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", link)
        run("ip", "link", "set", link, "master", BRIDGE, "up")
        inside = ("ip", "-n", link)
        run(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        self.furnish(exports)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.root / "host_key"))
        (self.root / "sshd_config").write_text(
            f"HostKey {self.root}/host_key\nAuthorizedKeysFile {authorized}\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nStrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
        )
        boot = self.root / "boot.sh"
        boot.write_text(self.boot_script())
        unshared = ("unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
        with (self.root / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", link, *unshared, "bash", str(boot)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={"PATH": path_of(), "HOME": str(HOME), "LANG": "C.UTF-8"},
                start_new_session=True,
            )

    def furnish(self, exports: dict[str, str]) -> None:
        """A home with `~/venv`, and what its owner has in `~/.bashrc`."""
        for name in ("home", "ray"):
            (self.root / name).mkdir(parents=True)
        lines = [f"export {name}={value!r}" for name, value in exports.items()]
        (self.home / ".bashrc").write_text("\n".join(lines) + "\n")
        run(sys.executable, "-m", "venv", "--without-pip", str(self.home / "venv"))
        packages = next((self.home / "venv/lib").glob("python3*/site-packages"))
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for name, module in {"pip": "pip._internal.cli.main", "ray": "ray.scripts.scripts"}.items():
            script = self.home / "venv/bin" / name
            script.write_text(f"#!{HOME}/venv/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
            script.chmod(0o755)

    def boot_script(self) -> str:
        """What its first process does before it becomes sshd."""
        lines = ["set -e", f"hostname {self.name}", "mount --make-rprivate /", "mkdir -p /run/sshd /tmp/ray"]
        for needed in {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY, self.root}:
            if needed.is_relative_to(HOME):  # the private home would hide it
                there = self.home / needed.relative_to(HOME)
                lines += [f"mkdir -p {there}", f"mount --rbind {needed} {there}"]
        lines += [f"mount --rbind {self.home} {HOME}", f"mount --bind {self.root}/ray /tmp/ray"]
        lines += ["mount -t tmpfs -o size=1g tmpfs /dev/shm", f"exec {shutil.which('sshd', path=path_of())} -D -e -f "]
        return "\n".join(lines) + f"{self.root}/sshd_config\n"

    def cut_off(self) -> None:
        """Pull its cable: nobody is told anything."""
        run("ip", "link", "set", f"dfkd-{self.name}", "down")

    def kill(self) -> None:
        """Its power fails: every process in it is gone."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def processes(self) -> list[str]:
        """Command lines of what runs in it, but for sshd and its sessions."""
        assert self.process is not None
        namespace = os.readlink(f"/proc/{self.leader()}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if words and "sshd" not in words:
                        found.append(words)
        return found

    def leader(self) -> int:
        """The first process inside."""
        assert self.process is not None
        children = run("ps", "-o", "pid=", "--ppid", str(self.process.pid)).split()
        return int(children[0])


@dataclass
class Bed:
    """The bridge, its hosts, and the laptop: this machine, with a home of its own."""

    root: Path
    exports: dict[str, str]
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def key(self) -> Path:
        """The private key that opens every host."""
        return self.root / "laptop/.ssh/id_ed25519"

    def environment(self) -> dict[str, str]:
        """Environment of the laptop's commands."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON", "DFKD"))}
        venv = Path(sys.prefix) / "bin"
        path = f"{venv}:{path_of()}"
        return own | {
            "HOME": str(self.root / "laptop"),
            "PATH": path,
            "TERM": "dumb",
            "RAY_AUTH_MODE": "token",
            **self.exports,
        }

    def add(self, name: str, address: str, exports: Mapping[str, str] | None = None) -> Host:
        """One more host, up when sshd answers; `exports` are variables of its own."""
        host = self.hosts[name] = Host(name, address, self.root / name)
        host.boot(Path(f"{self.key}.pub"), {**self.exports, **(exports or {})})
        for _ in range(3000):
            if self.ssh(host, "true", check=False).returncode == 0:
                return host
            time.sleep(0.1)
        raise AssertionError(f"{name} does not answer: {(host.root / 'log').read_text()}")

    def ssh(self, host: Host, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on a host as its owner would, in a login shell."""
        words = ["ssh", "-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        words += ["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", f"root@{host.address}"]
        done = subprocess.run(
            [*words, f"bash --login -i -c {shell_quoted(f'source ~/.bashrc; {command}')} 2>&1"],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert not check or done.returncode == 0, f"{host.name}: {command}: {done.stdout}{done.stderr}"
        return done


def shell_quoted(text: str) -> str:
    """One word for a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


@contextmanager
def made(root: Path, exports: dict[str, str]) -> Iterator[Bed]:
    """A bed without hosts; everything is taken away at the end."""
    clear()
    bed = Bed(root, exports)
    bed.key.parent.mkdir(parents=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(bed.key))
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        run("ip", "addr", "add", f"{LAPTOP}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        yield bed
    finally:
        for host in bed.hosts.values():
            host.kill()
        clear()


def clear() -> None:
    """Remove namespaces and bridge, also those of a run that was killed."""
    for line in run("ip", "netns", "list", check=False).splitlines():
        name = line.split()[0]
        if name.startswith("dfkd-"):
            for pid in run("ip", "netns", "pids", name, check=False).split():
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", name, check=False)
    for _ in range(3000):  # a link goes with its namespace, and that some time after its last process
        links = re.findall(r": (dfkd-\w+)", run("ip", "-o", "link", "show", check=False))
        if not links:
            break
        for link in links:
            run("ip", "link", "del", link, check=False)
        time.sleep(0.1)
    run("ip", "link", "del", BRIDGE, check=False)
