"""Certificates for a Flower deployment: a CA, the server's TLS certificate, and a key pair for each party.

TLS proves to the parties that the server is theirs; a party's key pair (registered once with the server) proves to the
server that the node is a party's. Node keys are no certificates: Flower compares the public key with those registered.

    folder/ca.crt ca.key               the CA; ca.key stays with whoever runs this, offline
    folder/server/                     ca.crt server.pem server.key, and in keys/ the parties' public keys to register
    folder/parties/NAME/               ca.crt NAME.key NAME.key.pub: all that this party gets
"""

import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PARTY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
HOST = re.compile(
    r"(?=.{1,253}$)(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
LONGEST = 36500  # days


def create_certificates(
    folder: str | Path, parties: Sequence[str], hosts: Sequence[str] = ("127.0.0.1", "localhost"), days: int = 365
) -> Path:
    """Creates the keys and certificates of a server and its parties, in a new folder that appears whole or not at all.

    ``hosts`` are the names and addresses under which the parties reach the server.
    """
    names, people = _parse_hosts(hosts), check_party_names(parties)
    if not 1 <= days <= LONGEST:
        raise ValueError(f"days is {days}; certificates are valid for 1 to {LONGEST} days, e.g. 365.")
    target = _check_absent(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))  # 0700
    try:
        _issue(made, names, days)
        for name in people:
            _write_keys(made, name)
        os.rename(made, target)  # an empty folder is replaced, anything else is refused
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return target


def add_party(folder: str | Path, name: str) -> Path:
    """Adds a party to a server that has its certificates. Returns its folder, to hand out."""
    target = Path(folder).expanduser()
    if not (target / "ca.crt").is_file():
        raise ValueError(f"{str(target)!r} has no ca.crt; name a folder that `fedlora flower certs` wrote.")
    (name,) = check_party_names([name])
    if (target / "parties" / name).exists():
        raise ValueError(f"the party {name!r} has its key in {str(target)!r} already; choose another name.")
    return _write_keys(target, name)


def _issue(folder: Path, hosts: list[x509.GeneralName], days: int) -> None:
    """The CA and, signed by it, the server's certificate."""
    until = datetime.now(UTC) + timedelta(days=days)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = _create_ca(ca_key, until)
    server = _create_server_certificate(key, ca, ca_key, hosts, until)
    pem = ca.public_bytes(serialization.Encoding.PEM)
    _write(folder / "ca.crt", pem, 0o644)
    _write(folder / "ca.key", _pem(ca_key))
    _write(folder / "server" / "ca.crt", pem, 0o644)
    _write(folder / "server" / "server.pem", server.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / "server" / "server.key", _pem(key))


def _create_ca(key: ec.EllipticCurvePrivateKey, until: datetime) -> x509.Certificate:
    name = _name(f"fedlora CA {x509.random_serial_number():x}"[:26])  # two CAs are never taken for one another
    return (
        _begin_certificate(name, name, key.public_key(), until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _create_server_certificate(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    hosts: list[x509.GeneralName],
    until: datetime,
) -> x509.Certificate:
    issuer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _begin_certificate(_name("fedlora server"), ca.subject, key.public_key(), until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _begin_certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))  # clocks differ
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(**allowed: bool) -> x509.KeyUsage:
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{use: allowed.get(use, False) for use in every})


def _write_keys(folder: Path, name: str) -> Path:
    """A party's folder; its public key also goes to the server's."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    line, own = public + f" {name}\n".encode(), folder / "parties" / name
    _write(own / f"{name}.key", private)
    _write(own / f"{name}.key.pub", line, 0o644)
    _write(own / "ca.crt", (folder / "ca.crt").read_bytes(), 0o644)
    _write(folder / "server" / "keys" / f"{name}.key.pub", line, 0o644)
    return own


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """A new file, private from its first byte; never over another."""
    for folder in reversed(path.parents):
        folder.mkdir(exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _parse_hosts(hosts: Sequence[str]) -> list[x509.GeneralName]:
    if not hosts:
        raise ValueError("no host is named; name the server's addresses, e.g. 127.0.0.1 or fl.example.org.")
    return [_parse_host(text) for text in dict.fromkeys(hosts)]


def _parse_host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if HOST.fullmatch(text) and not re.fullmatch(r"[0-9.]+", text):
            return x509.DNSName(text)
    raise ValueError(f"{text!r} is neither an IP address nor a host name; write e.g. 10.0.0.5 or fl.example.org.")


def check_party_names(parties: Sequence[str]) -> list[str]:
    """The names, each of which can name a file and a process. ``ValueError`` otherwise."""
    if not parties:
        raise ValueError("no party is named; name each one, e.g. hospital-a,hospital-b.")
    for name in parties:
        if not PARTY.fullmatch(name):
            raise ValueError(f"the party {name!r} cannot name a file; use up to 64 letters, digits, '-', '_' and '.'.")
    if len({name.lower() for name in parties}) < len(parties):
        raise ValueError(f"a party is named twice in {', '.join(parties)}; give each its own name.")
    return list(parties)


def _check_absent(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists already and is not empty; keys are never overwritten: name another.")
    return path
