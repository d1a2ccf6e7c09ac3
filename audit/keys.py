"""The keys of the audit log: which there are, their files, and what each is used for.

    master.key      wraps the data keys that content is encrypted with; without it no content can be read
    pseudonym.key   turns identities into the pseudonyms that stand in leaves; whoever has it can test a guess
    signing.key     Ed25519, signs checkpoints; whoever has it can sign a false history (witnesses would refuse it)

Each is one file, mode 0600, of one line that says what it is, so that no file can be taken for another:

    probity/master-key/v1 3b1f…64 hex digits…

Every tenant's key-encryption key is derived from the master key with HKDF, not stored: there is one secret to back up,
and the key of one tenant says nothing about another's. Erasure destroys data keys, not these (keystore.py).

Knows no database. Source: RFC 5869 (HKDF); RFC 8032 (Ed25519).
"""

from __future__ import annotations

import hmac
import os
import secrets
import shutil
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from audit.content import Random
from audit.durable import sync_directory, write_new_file
from audit.note import Signer, Verifier

# KeyRefused               catch this
# ├── KeyFileMissing       a key's file is not there
# ├── KeyFileExists        keys are to be created where there are some
# ├── KeyFileExposed       others than the owner may read or write the file
# ├── KeyFileMalformed     the file is not a key of this kind, or of another length
# ├── KeysOfAnother        a key is whole, and not the one that this log was written with
# └── WrappedKeyRefused    a wrapped data key was not wrapped for this tenant by this master key


class KeyRefused(Exception):
    """A key cannot be used."""


class KeyFileMissing(KeyRefused):
    """The file of a key does not exist."""


class KeyFileExists(KeyRefused):
    """There are keys where new ones should be written."""


class KeyFileExposed(KeyRefused):
    """Others than its owner may read or write the file of a key."""


class KeyFileMalformed(KeyRefused):
    """The file does not hold a key of the kind that was asked for."""


class KeysOfAnother(KeyRefused):
    """A key is not the one that this log was written with."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"`{kind}.key` {what}; put back the keys that this log was written with")


class WrappedKeyRefused(KeyRefused):
    """A wrapped data key does not unwrap."""


KEY_BYTES = 32  # every key of ours
PSEUDONYM_DIGITS = 32  # hex digits, 128 bits
MASTER, PSEUDONYM, SIGNING = "master", "pseudonym", "signing"
_SALT_BYTES = 32
_ZERO_NONCE = bytes(12)


class KeyEncryption(Protocol):
    """Wraps data keys for a tenant: a file here, a KMS elsewhere."""

    def wrap(self, tenant: str, data_key: bytes) -> bytes: ...

    def unwrap(self, tenant: str, wrapped: bytes) -> bytes:
        """Raise WrappedKeyRefused unless `wrapped` was wrapped for `tenant`."""
        ...


class FileKeyEncryption:
    """Key encryption under a master key that was read from a file.

    wrapped = salt ‖ AES-256-GCM(HMAC-SHA256(tenant key, salt), zero nonce, data key, associated data: tenant). With 32
    random bytes of salt every wrap has a key of its own, so that the limit of 2**32 messages a key does not apply to
    tenants with many requests.
    """

    def __init__(self, master_key: bytes, random: Random = os.urandom) -> None:
        if len(master_key) != KEY_BYTES:
            raise KeyFileMalformed(f"the master key has {len(master_key)} bytes instead of {KEY_BYTES}")
        self._master_key = master_key
        self._random = random
        self._tenant_keys: dict[str, bytes] = {}

    def wrap(self, tenant: str, data_key: bytes) -> bytes:
        """Return the wrapped data key: 80 bytes for one of 32."""
        salt = self._random(_SALT_BYTES)
        return salt + self._cipher(tenant, salt).encrypt(_ZERO_NONCE, data_key, tenant.encode())

    def unwrap(self, tenant: str, wrapped: bytes) -> bytes:
        salt, encrypted = wrapped[:_SALT_BYTES], wrapped[_SALT_BYTES:]
        try:
            return self._cipher(tenant, salt).decrypt(_ZERO_NONCE, encrypted, tenant.encode())
        except (InvalidTag, ValueError) as error:
            raise WrappedKeyRefused(f"a data key of `{tenant}` does not unwrap with this master key") from error

    def _cipher(self, tenant: str, salt: bytes) -> AESGCM:
        return AESGCM(hmac.new(self._tenant_key(tenant), salt, "sha256").digest())

    def _tenant_key(self, tenant: str) -> bytes:
        key = self._tenant_keys.get(tenant)
        if key is None:
            info = b"probity/tenant-key/v1\0" + tenant.encode()
            key = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self._master_key)
            self._tenant_keys = {**self._tenant_keys, tenant: key} if len(self._tenant_keys) < 1024 else {tenant: key}
        return key


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys one gateway holds. `repr` shows none of them."""

    encryption: KeyEncryption = field(repr=False)
    pseudonym_key: bytes = field(repr=False)
    signing_key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def create(cls, directory: Path, random: Random = secrets.token_bytes) -> Keyring:
        """Make all keys and their files: the directory appears whole or not at all, mode 0700.

        Raises:
            KeyFileExists: the directory exists and is not empty.
        """
        beside = directory.with_name(f".{directory.name}.{os.getpid()}.new")
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # of a crash, whose process had our number
        beside.mkdir(mode=0o700)
        try:
            for kind in (MASTER, PSEUDONYM, SIGNING):
                write_new_file(beside / f"{kind}.key", _encode(kind, random(KEY_BYTES)))
            sync_directory(beside)
            beside.rename(directory)  # replaces an empty directory, and no other
        except OSError as error:
            for kind in (MASTER, PSEUDONYM, SIGNING):
                (beside / f"{kind}.key").unlink(missing_ok=True)
            beside.rmdir()
            if directory.exists():
                raise KeyFileExists(f"`{directory.name}` is not empty; load the keys that are there") from error
            raise
        sync_directory(directory.parent)
        return cls.load(directory)

    @classmethod
    def load(cls, directory: Path) -> Keyring:
        """Read all keys.

        Raises:
            KeyFileMissing, KeyFileExposed, KeyFileMalformed: the file is named in the message.
        """
        return cls(
            encryption=FileKeyEncryption(read_key(directory, MASTER)),
            pseudonym_key=read_key(directory, PSEUDONYM),
            signing_key=Ed25519PrivateKey.from_private_bytes(read_key(directory, SIGNING)),
        )

    def signer(self, origin: str) -> Signer:
        """Return what signs the checkpoints of the log `origin`, under the log's own name."""
        return Signer(origin, self.signing_key)

    def verifier(self, origin: str) -> Verifier:
        return self.signer(origin).verifier

    def pseudonym(self, tenant: str, kind: str, value: str) -> str:
        """Return what stands in a leaf for `value`, e.g. of kind `subject`."""
        return pseudonym(self.pseudonym_key, tenant, kind, value)


@lru_cache(maxsize=4096)  # the same few ask again and again, and a request needs three
def pseudonym(key: bytes, tenant: str, kind: str, value: str) -> str:
    """Return HMAC-SHA256(key, "probity/pseudonym/v1" ‖ 0 ‖ tenant ‖ 0 ‖ kind ‖ 0 ‖ value), its first 32 hex digits.

    Equal values of one tenant and kind get equal pseudonyms; across tenants they cannot be linked.
    """
    if "\0" in tenant or "\0" in kind:
        raise ValueError("a tenant or kind holds a zero byte")
    text = "\0".join(("probity/pseudonym/v1", tenant, kind, value))
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), "sha256").hexdigest()[:PSEUDONYM_DIGITS]


def read_key(directory: Path, kind: str) -> bytes:
    """Return the 32 bytes of the key `kind` in `directory`.

    Raises:
        KeyFileMissing: no such file.
        KeyFileExposed: its mode gives anything to group or others.
        KeyFileMalformed: not a key of this kind.
    """
    name = f"{kind}.key"
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise KeyFileMissing(f"`{name}` is missing; restore the keys this log was written with") from error
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise KeyFileExposed(f"`{name}` has mode {mode:04o}; see who has read it, then run `chmod 600 {name}`")
        return _decode(kind, file.read(1024))


def _encode(kind: str, key: bytes) -> bytes:
    return f"probity/{kind}-key/v1 {key.hex()}\n".encode()


def _decode(kind: str, content: bytes) -> bytes:
    label, _, digits = content.decode("ascii", "replace").removesuffix("\n").partition(" ")
    try:
        key = bytes.fromhex(digits)
    except ValueError:
        key = b""
    if label != f"probity/{kind}-key/v1" or len(key) != KEY_BYTES:
        raise KeyFileMalformed(f"`{kind}.key` is not `probity/{kind}-key/v1` and {2 * KEY_BYTES} hex digits")
    return key
