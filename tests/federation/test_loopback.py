"""Real SuperLink and SuperNodes on 127.0.0.1: a whole federation, its faults, and TLS."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower needs Python 3.11")

from federated import LABELS, activate, found, join  # noqa: E402
from running import threads_for_pools  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from loopback import Loopback  # noqa: E402

pytestmark = pytest.mark.slow
LIMIT_S = 500.0


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A federation that three sites have joined; the third draws one label only."""
    with pytest.MonkeyPatch.context() as patch:
        threads_for_pools(patch)
        root = tmp_path_factory.mktemp("three")
        activate(root, patch)
        sites = found(root, rounds=2)
        join(sites, "north", 911)
        join(sites, "south", 921, offset=2.0)
        join(sites, "west", 931, labels={"background": 0, "organ": 1}, values=(1,))
    return sites


@pytest.fixture
def folder(three, tmp_path, monkeypatch):
    """The federation before its first round, with nnU-Net's folders set."""
    shutil.copytree(three.folder, tmp_path / "federation", ignore=shutil.ignore_patterns("run"))
    activate(three.root, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    pyproject = tmp_path / "federation" / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace(str(three.folder), str(tmp_path / "federation")))
    return tmp_path / "federation"


def start(flower: Loopback, three, *names: str) -> None:
    flower.start_link()
    for name in names or three.datasets:
        flower.start_node(name, three.datasets[name])


def history(folder: Path):
    return json.loads((folder / "run" / "history.json").read_text())


def wait_for(condition, seconds: float = LIMIT_S) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.2)


def test_three_sites_train_one_network(three, folder, tmp_path):
    with Loopback(tmp_path / "flower") as flower:
        start(flower, three)
        flower.run(folder, seconds=LIMIT_S, settings={"min-sites": 3})
    told = history(folder)
    assert [sorted(entry["sites"]) for entry in told["rounds"]] == [["north", "south", "west"]] * 2
    assert told["rounds"][0]["sites"]["west"]["draws"] == ["organ"]
    assert (folder / "run" / "result" / "adapter.safetensors").is_file() and set(told["final_dice"]) == set(three.datasets)
    assert set(LABELS) - {"background"} == set(told["final_dice"]["west"])


def test_a_killed_site_is_left_out_and_comes_back(three, folder, tmp_path):
    with Loopback(tmp_path / "flower") as flower:
        start(flower, three)
        flower._start("run", ["flwr", "run", str(folder), "loopback", "--stream", "--run-config", "min-sites=2 round-minutes=4"])
        wait_for(lambda: (folder / "run" / "replies").is_dir())  # someone has answered: the round is running
        flower.stop("west", kill=True)
        wait_for(lambda: (folder / "run" / "history.json").is_file() and history(folder)["rounds"])
        flower.start_node("west", three.datasets["west"])
        wait_for(lambda: "final_dice" in history(folder))
    assert len(history(folder)["rounds"]) == 2 and all(len(entry["sites"]) >= 2 for entry in history(folder)["rounds"])


def test_a_site_that_hangs_is_left_out_by_name(three, folder, tmp_path):
    with Loopback(tmp_path / "flower") as flower:
        start(flower, three)
        flower._start("run", ["flwr", "run", str(folder), "loopback", "--stream", "--run-config", "min-sites=2 round-minutes=3"])
        wait_for(lambda: "of 2: north, south, west" in flower.log("run"))
        os.killpg(flower.processes["west"].pid, signal.SIGSTOP)  # it trains: the order is on its way
        wait_for(lambda: (folder / "run" / "history.json").is_file() and "final_dice" in history(folder))
    told = history(folder)
    assert [sorted(entry["sites"]) for entry in told["rounds"]] == [["north", "south"]] * 2
    assert any("did not answer" in entry["left_out"].get("west", "") for entry in told["rounds"])


def test_after_a_kill_of_the_server_the_same_command_goes_on(three, folder, tmp_path):
    with Loopback(tmp_path / "first") as flower:
        start(flower, three, "north", "south")
        flower._start("run", ["flwr", "run", str(folder), "loopback"])
        wait_for(lambda: (folder / "run" / "state.safetensors").is_file())
        flower.stop("superlink", kill=True)
    assert len(history(folder)["rounds"]) == 1
    with Loopback(tmp_path / "second") as flower:
        start(flower, three, "north", "south")
        said = flower.run(folder, seconds=LIMIT_S)
    assert "round 2 of 2" in said and "round 1 of 2" not in said and len(history(folder)["rounds"]) == 2


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Write a certificate authority, and a certificate of 127.0.0.1 with its key; return the three files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now, keys = datetime.datetime.now(datetime.timezone.utc), [ec.generate_private_key(ec.SECP256R1()) for _ in (0, 1)]
    made = []
    for subject, key, ca in (("test authority", keys[0], True), ("127.0.0.1", keys[1], False)):
        builder = (x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("test authority"))
                   .public_key(key.public_key()).serial_number(x509.random_serial_number())
                   .not_valid_before(now - datetime.timedelta(minutes=5))
                   .not_valid_after(now + datetime.timedelta(hours=1))
                   .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True))
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName(
                [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]), critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    made.append(keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
                                      serialization.NoEncryption()))
    files = tuple(folder / file for file in ("ca.crt", "server.pem", "server.key"))
    for file, content in zip(files, made):
        file.write_bytes(content)
    return files


def test_with_tls_a_federation_works_and_a_stranger_without_the_certificate_does_not(three, folder, tmp_path):
    ca, certificate, key = certificates(tmp_path)
    link = ("--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with Loopback(tmp_path / "flower", link_options=link, node_options=("--root-certificates", str(ca)),
                  certificate=ca) as flower:
        start(flower, three, "north", "south")
        flower.node_options = ("--insecure",)
        flower.start_node("stranger", three.datasets["west"])
        flower.run(folder, seconds=LIMIT_S)
    assert [sorted(entry["sites"]) for entry in history(folder)["rounds"]] == [["north", "south"]] * 2


def own_key(file: Path) -> Path:
    """Write a SuperNode's key, and its public key beside it, as `ssh-keygen -t ecdsa -b 384` does."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, ssh = ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, ssh, serialization.NoEncryption()))
    file.with_suffix(".pub").write_bytes(key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
    return file


def test_with_keys_only_registered_sites_take_part(three, folder, tmp_path):
    ca, certificate, key = certificates(tmp_path)
    link = ("--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key),
            "--enable-supernode-auth")
    with Loopback(tmp_path / "flower", link_options=link, certificate=ca) as flower:
        flower.start_link()
        for name, dataset in three.datasets.items():
            own = own_key(tmp_path / name)
            if name != "west":
                subprocess.run(["flwr", "supernode", "register", f"{own}.pub", "loopback"], env=flower.environment,
                               check=True)
            flower.node_options = ("--root-certificates", str(ca), "--auth-supernode-private-key", str(own))
            flower.start_node(name, dataset)
        flower.run(folder, seconds=LIMIT_S)
        refused = flower.log("west")
    assert [sorted(entry["sites"]) for entry in history(folder)["rounds"]] == [["north", "south"]] * 2
    assert "ERROR" in refused
