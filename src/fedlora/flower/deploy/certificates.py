"""Certificates for a Flower deployment: a CA, the server's TLS certificate, and a key pair for each party.

TLS lets the parties authenticate the server. A party's key pair, registered once with the server, lets the server
authenticate the party's node. Node keys are no certificates: Flower compares the public key with the registered ones.

    folder/ca.crt ca.key               the CA; ca.key stays offline with the operator
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
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PARTY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
HOST = re.compile(
    r"(?=.{1,253}$)(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
LONGEST = 36500  # days
KEY_USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def create_certificates(
    folder: str | Path, parties: Sequence[str], hosts: Sequence[str] = ("127.0.0.1", "localhost"), days: int = 365
) -> Path:
    """Create the keys and certificates of a server and its parties in a new folder, completely or not at all.

    ``hosts`` are the names and addresses under which the parties reach the server.
    """
    if not hosts:
        raise ValueError("no host is named; name the server's addresses, e.g. 127.0.0.1 or fl.example.org.")
    names, parties = [_parse_host(text) for text in dict.fromkeys(hosts)], check_party_names(parties)
    if not 1 <= days <= LONGEST:
        raise ValueError(f"days is {days}; certificates are valid for 1 to {LONGEST} days, e.g. 365.")
    target = Path(folder).expanduser()
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{str(target)!r} exists already and is not empty; keys are never overwritten: name another.")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))  # 0700
    try:
        _issue(draft, names, days)
        for name in parties:
            _write_keys(draft, name)
        os.rename(draft, target)  # replaces an empty folder, and fails for anything else
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def add_party(folder: str | Path, name: str) -> Path:
    """Add a party to a server that has its certificates. Returns the folder to hand out to the party."""
    target = Path(folder).expanduser()
    if not (target / "ca.crt").is_file():
        raise ValueError(f"{str(target)!r} has no ca.crt; name a folder that `fedlora flower certs` wrote.")
    (name,) = check_party_names([name])
    if (target / "parties" / name).exists():
        raise ValueError(f"the party {name!r} has its key in {str(target)!r} already; choose another name.")
    return _write_keys(target, name)


def _issue(folder: Path, hosts: list[x509.GeneralName], days: int) -> None:
    """Write the CA and the server's certificate, which the CA signs."""
    until = datetime.now(UTC) + timedelta(days=days)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = f"fedlora CA {x509.random_serial_number():x}"[:26]  # random: no two CAs are confused
    authority = x509.BasicConstraints(ca=True, path_length=0), _key_usage("key_cert_sign", "crl_sign")
    ca = _certify(ca_name, ca_name, ca_key, ca_key, until, *authority)
    server = _certify(
        "fedlora server", ca_name, key, ca_key, until,
        x509.BasicConstraints(ca=False, path_length=None), _key_usage("digital_signature"),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), x509.SubjectAlternativeName(hosts),
    )  # fmt: skip
    _write(folder / "ca.crt", ca, 0o644)
    _write(folder / "ca.key", ca_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _write(folder / "server" / "ca.crt", ca, 0o644)
    _write(folder / "server" / "server.pem", server, 0o644)
    _write(folder / "server" / "server.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _certify(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, ca_key: ec.EllipticCurvePrivateKey,
    until: datetime, *extensions: x509.ExtensionType,
) -> bytes:  # fmt: skip
    """Return a certificate of ``key``, signed with ``ca_key``, in PEM form."""
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer)]
    builder = x509.CertificateBuilder(
        issuer_name=names[1], subject_name=names[0], public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=datetime.now(UTC) - timedelta(hours=1),  # clocks differ
        not_valid_after=until,
    )  # fmt: skip
    identifiers = (
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
    )
    for extension in (*identifiers, *extensions):
        builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints | x509.KeyUsage))
    return builder.sign(ca_key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _key_usage(*uses: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in uses for use in KEY_USES})


def _write_keys(folder: Path, name: str) -> Path:
    """Write and return a party's folder; its public key is also written to the server's folder."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()
    party = folder / "parties" / name
    _write(party / f"{name}.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    _write(party / f"{name}.key.pub", public, 0o644)
    _write(party / "ca.crt", (folder / "ca.crt").read_bytes(), 0o644)
    _write(folder / "server" / "keys" / f"{name}.key.pub", public, 0o644)
    return party


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file, private from its first byte. Fails if the file exists."""
    for folder in reversed(path.parents):
        folder.mkdir(exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _parse_host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if HOST.fullmatch(text) and not re.fullmatch(r"[0-9.]+", text):
            return x509.DNSName(text)
    raise ValueError(f"{text!r} is neither an IP address nor a host name; write e.g. 10.0.0.5 or fl.example.org.")


def check_party_names(parties: Sequence[str]) -> list[str]:
    """Return the names. Raises ``ValueError`` if one of them cannot be the name of a file and of a process."""
    if not parties:
        raise ValueError("no party is named; name each one, e.g. hospital-a,hospital-b.")
    for name in parties:
        if not PARTY.fullmatch(name):
            raise ValueError(f"the party {name!r} cannot name a file; use up to 64 letters, digits, '-', '_' and '.'.")
    if len({name.lower() for name in parties}) < len(parties):
        raise ValueError(f"a party is named twice in {', '.join(parties)}; give each its own name.")
    return list(parties)
