"""Real ssh on this machine, for tests: a sshd on two addresses of the loopback interface, with keys of its own."""

import getpass
import os
import pathlib
import shutil
import subprocess
import time

from train_processes import free_port

PROGRAMS = ("sshd", "ssh", "ssh-keygen")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SERVER = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
SetEnv {variables}
"""
# `far` is reached through `first`; `nameless` too, but by an address, since its name is known nowhere.
CLIENT = """
Host first
  HostName 127.0.0.1
Host second far
  HostName 127.0.0.2
Host far
  ProxyJump first
Host nameless
  HostName nameless.invalid
  ProxyCommand ssh -F {folder}/config -W 127.0.0.2:{port} first
Host *
  Port {port}
  User {user}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  HostKeyAlias loop
  UserKnownHostsFile {folder}/known_hosts
"""


def missing() -> list[str]:
    """The programs of OpenSSH that are not installed (Debian: openssh-server)."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


class Hosts:
    """Hosts `first`, `second`, `far` and `nameless` of the ssh configuration `config`, all of them this machine.

    Commands there see `variables`, and nothing of this environment. `stop()` ends the sshd.
    """

    def __init__(self, folder: pathlib.Path, variables: dict[str, str]):
        self.folder, self.config, self.port = folder, folder / "config", free_port()
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (folder / "known_hosts").write_text("loop " + (folder / "host_key.pub").read_text())
        self.config.write_text(CLIENT.format(folder=folder, port=self.port, user=getpass.getuser()))
        words = " ".join(f'"{name}={value}"' for name, value in variables.items())
        (folder / "sshd_config").write_text(SERVER.format(folder=folder, port=self.port, variables=words))
        if os.getuid() == 0:  # where sshd locks part of itself in; Debian's service makes it
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        sshd = shutil.which("sshd", path=PATH)
        with (folder / "sshd.log").open("w") as log:
            self._sshd = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 30
        while (done := self.tell("second", "true")).returncode:
            if self._sshd.poll() is not None or time.monotonic() > until:
                said = (self.folder / "sshd.log").read_text()
                self.stop()
                raise AssertionError(f"sshd does not start: {said} {done.stderr}")
            time.sleep(0.1)

    def tell(self, host: str, command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["ssh", "-F", self.config, "-o", "BatchMode=yes", host, command], capture_output=True, text=True, timeout=30
        )

    def stop(self) -> None:
        self._sshd.terminate()
        self._sshd.wait()
