"""Certificates: a real handshake on loopback, and what an outsider meets."""

import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading

import pytest

pytest.importorskip("flwr", reason="needs the flower extra")

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.flower.deploy.certificates import add_party, create_certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return create_certificates(tmp_path_factory.mktemp("tls") / "made", ["a", "hospital-b"])


class Server:
    """Answers on loopback with TLS, one request after the other."""

    def __init__(self, folder):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                try:
                    with self.context.wrap_socket(connection, server_side=True) as secure:
                        if secure.recv(4096):
                            secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                except OSError:
                    continue  # a client that does not trust this server

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join()


def handshake(port, ca, name="127.0.0.1"):
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain, server_hostname=name) as it:
        return it.version()


def test_python_and_httpx_trust_the_server_and_no_other_ca(made, tmp_path):
    other = create_certificates(tmp_path / "other", ["a"])
    with Server(made / "server") as server:
        assert handshake(server.port, made / "parties" / "a" / "ca.crt") == "TLSv1.3"
        assert handshake(server.port, made / "ca.crt", "localhost") == "TLSv1.3"
        trusting = ssl.create_default_context(cafile=made / "ca.crt")
        assert httpx.get(f"https://localhost:{server.port}", verify=trusting, trust_env=False).text == "ok"
        with pytest.raises(ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED"):
            handshake(server.port, other / "ca.crt")
        with pytest.raises(ssl.SSLCertVerificationError, match="[Hh]ostname mismatch"):
            handshake(server.port, made / "ca.crt", "example.org")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_openssl_verifies(made, tmp_path):
    def verify(ca):
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_ip", "127.0.0.1"]
        return subprocess.run([*command, "-CAfile", ca, made / "server" / "server.pem"], capture_output=True).returncode

    assert verify(made / "ca.crt") == 0
    assert verify(create_certificates(tmp_path / "other", ["a"]) / "ca.crt") != 0


def test_what_lies_where_and_who_may_read_it(made):
    found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    server = {f"server/{name}" for name in ("ca.crt", "server.pem", "server.key")}
    keys = {f"server/keys/{name}.key.pub" for name in ("a", "hospital-b")}
    own = {f"parties/{n}/{file}" for n in ("a", "hospital-b") for file in ("ca.crt", f"{n}.key", f"{n}.key.pub")}
    assert found == {"ca.crt", "ca.key"} | server | keys | own
    for path in (made, *made.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert not path.is_dir() or mode == 0o700, path
        assert path.suffix != ".key" or mode == 0o600, path


def test_a_partys_key_is_what_flower_reads(made, tmp_path):
    folder = made / "parties" / "a"
    private = serialization.load_ssh_private_key((folder / "a.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((folder / "a.key.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
    assert private.public_key() == public
    assert (made / "server" / "keys" / "a.key.pub").read_bytes() == (folder / "a.key.pub").read_bytes()
    if shutil.which("ssh-keygen"):
        shown = subprocess.run(["ssh-keygen", "-y", "-f", folder / "a.key"], capture_output=True, check=True).stdout
        assert shown.split()[:2] == (folder / "a.key.pub").read_bytes().split()[:2]


def test_a_party_joins_later(tmp_path):
    made = create_certificates(tmp_path / "made", ["a"])
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    own = add_party(made, "late")
    assert sorted(path.name for path in own.iterdir()) == ["ca.crt", "late.key", "late.key.pub"]
    assert (own / "ca.crt").read_bytes() == before[made / "ca.crt"]
    assert (made / "server" / "keys" / "late.key.pub").is_file()
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(ValueError, match="'late' has its key in .* already; choose another name"):
        add_party(made, "late")
    with pytest.raises(ValueError, match="no ca.crt; name a folder"):
        add_party(tmp_path, "b")


def test_nothing_is_overwritten_and_nothing_is_left_half_done(tmp_path):
    made = create_certificates(tmp_path / "made", ["a"])
    key = (made / "ca.key").read_bytes()
    with pytest.raises(ValueError, match="exists already .* never overwritten"):
        create_certificates(made, ["a"])
    assert (made / "ca.key").read_bytes() == key
    (tmp_path / "empty").mkdir()
    assert (create_certificates(tmp_path / "empty", ["a"]) / "ca.crt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "made"]


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"parties": []}, "no party is named"),
        ({"parties": ["../a"]}, "'../a' cannot name a file"),
        ({"parties": ["a", "A"]}, "named twice in a, A"),
        ({"hosts": []}, "no host is named"),
        ({"hosts": ["10.0.0"]}, "'10.0.0' is neither an IP address nor a host name"),
        ({"hosts": ["https://a.org"]}, "neither an IP address nor a host name"),
        ({"days": 0}, "days is 0; certificates are valid for 1 to 36500 days"),
    ],
)
def test_mistakes_are_one_sentence(change, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        create_certificates(tmp_path / "made", **{"parties": ["a"], **change})
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_goes_to_whom(commands, tmp_path):
    command = ["fedlora", "flower", "certs", "keys", "--parties"]
    found = commands.call([*command, "a,b", "--hosts", "fl.example.org,10.0.0.4"], tmp_path)
    assert found.returncode == 0, found.stderr
    assert all(f"keys/parties/{name}/" in found.stdout for name in "ab")
    assert "flwr supernode register keys/server/keys/b.key.pub fl" in found.stdout
    assert "--superlink fl.example.org:8443" in found.stdout
    assert all(f"--node-config 'client={number} " in found.stdout for number in (0, 1))
    again = commands.call([*command, "a"], tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("fedlora: 'keys' exists already")


def test_help_is_quick_and_a_missing_extra_is_one_sentence(tmp_path):
    code = "import sys, fedlora.cli; print([m for m in ('flwr', 'cryptography', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    code = "import sys; sys.modules['flwr'] = None; sys.argv[1:] = ['flower', 'certs', 'x', '--parties', 'a']\n"
    command = [sys.executable, "-c", code + "from fedlora.cli import main; main()"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1 and "pip install 'fedlora[flower]'" in found.stderr
