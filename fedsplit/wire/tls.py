"""TLS for packets between nodes: certificates of one authority on both sides, on a socket that two threads use at once.

A folder has `ca.pem`, the certificate of the authority; `cert.pem`, a certificate that the authority has issued; and
`key.pem`, its private key. Each side shows its certificate, and checks the other's. Host names are not checked: who has
a certificate of the authority is a node.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Iterable
from pathlib import Path

from fedsplit.errors import SettingError, first_line

CA, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"
"""Files of the folder."""

_CHUNK = 2**18
"""Most bytes that are encrypted, or taken from the socket, at once. A copy of a packet would double its memory."""


class NotTrusted(Exception):
    """The certificates of this side cannot be used, or one side does not accept the other's."""


def _context(folder: Path, is_server: bool) -> ssl.SSLContext:
    """Returns the rules for the connections of one side.

    Raises:
        OSError, ValueError: A file is missing, cannot be read, or is not what its name says.
    """
    for name in (CA, CERTIFICATE, KEY):
        with open(folder / name, "rb"):  # the error of the ssl module would not name the file
            pass
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(folder / CA)
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password=_no_password)
    if is_server:
        # A ticket would come before the first answer. A client that waits for room to send would take it for an answer.
        context.num_tickets = 0
    return context


def _no_password() -> str:
    """Is asked for the password of a key. By default the ssl module would ask the user, on the terminal."""
    raise ValueError(f"{KEY} is encrypted by a password")


def problem(folder: Path) -> str:
    """Returns what is wrong with a folder of certificates, in a line; an empty text if it can be used.

    Both sides of a connection are played by this folder: so a certificate is found that has expired, that another
    authority has issued, or that does not allow both sides.

    Example:
        >>> problem(Path("nowhere"))
        'nowhere/ca.pem: No such file or directory'
    """
    try:
        server = TlsSide(_context(folder, is_server=True), is_server=True)
        client = TlsSide(_context(folder, is_server=False), is_server=False)
        for _ in range(4):  # hello, hello and certificate, certificate, and what is left
            server.hear(client.say())
            client.hear(server.say())
    except ssl.SSLCertVerificationError as error:
        return f"{folder / CERTIFICATE}: {error.verify_message}"
    except ssl.SSLError as error:
        return f"{folder}: {_words(error)}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError as error:
        return f"{folder}: {first_line(error)}"
    return ""


def check_certificates(folder: str) -> None:
    """Checks the folder of certificates of the setting `wire.tls`; an empty one is no TLS.

    Raises:
        SettingError: The certificates cannot be used.
    """
    if folder and (reason := problem(Path(folder))):
        raise SettingError("wire.tls", folder, f"a folder with {CA}, {CERTIFICATE} and {KEY} ({reason})")


def authority(folder: str) -> str:
    """Returns a digest of the authority's certificate, by which nodes find out whether they have the same."""
    return hashlib.sha256((Path(folder) / CA).read_bytes()).hexdigest()


def _words(error: ssl.SSLError) -> str:
    """Returns the reason of an error of the ssl module, without numbers of lines in C.

    Example:
        >>> _words(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)"))
        'wrong version number'
    """
    text = str(error.args[-1] if error.args else error)
    text, _, _ = text.partition(" (_ssl")
    _, _, without_code = text.partition("] ")
    return without_code or text


class TlsSide:
    """One side of a TLS connection in memory: bytes that have come in, bytes that are to go out.

    Any thread may call the methods.
    """

    def __init__(self, context: ssl.SSLContext, is_server: bool) -> None:
        """Has said nothing yet."""
        self._guard = threading.Lock()  # OpenSSL allows one call at a time
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self.is_done = False

    def hear(self, came: bytes) -> None:
        """Takes bytes of the peer; none are the end of the connection."""
        with self._guard:
            if came:
                self._incoming.write(came)
            else:
                self._incoming.write_eof()

    def say(self) -> bytes:
        """Goes on with the handshake, and returns the bytes for the peer.

        Raises:
            ssl.SSLError: A certificate is not accepted, or the peer does not speak TLS.
        """
        with self._guard:
            try:
                self._tls.do_handshake()
                self.is_done = True
            except ssl.SSLWantReadError:
                pass
            return self._outgoing.read()

    def last_words(self) -> bytes:
        """Returns the bytes for the peer after an error, by which the peer is told of it."""
        with self._guard:
            return self._outgoing.read()

    def decrypt_into(self, memory: memoryview) -> int:
        """Writes bytes of the peer into memory; returns how many, or -1 while there are none."""
        with self._guard:
            try:
                return self._tls.read(len(memory), memory)  # type: ignore[return-value]  # a count, with memory
            except ssl.SSLWantReadError:
                return -1

    def encrypt(self, piece: memoryview) -> bytes:
        """Returns the bytes for the peer that carry a piece of memory."""
        with self._guard:
            self._tls.write(piece)
            return self._outgoing.read()


class SecureConnection:
    """A socket with TLS, of which one thread reads while another one writes. `ssl.SSLSocket` does not allow that.

    The methods are those of a socket that `fedsplit.wire.frames` uses.
    """

    def __init__(self, connection: socket.socket, folder: str, is_server: bool) -> None:
        """Makes the handshake.

        Args:
            connection: Connection to the peer.
            folder: Folder of the certificates.
            is_server: True on the side that was called.

        Raises:
            NotTrusted: The certificates of this side cannot be used, or this side does not accept the peer's.
            OSError: The connection is broken.
        """
        self._socket = connection
        self._unsent = memoryview(b"")
        self._carried = 0  # bytes of the caller in `_unsent`
        try:
            self._side = TlsSide(_context(Path(folder), is_server), is_server)
        except (OSError, ValueError) as error:
            raise NotTrusted(problem(Path(folder)) or first_line(error)) from error
        try:
            while True:
                connection.sendall(self._side.say())
                if self._side.is_done:
                    return
                self._side.hear(connection.recv(_CHUNK))
        except ssl.SSLError as error:
            connection.sendall(self._side.last_words())
            raise NotTrusted(refusal(error)) from error

    def recv_into(self, memory: memoryview) -> int:
        """Waits for bytes, and writes them into memory; returns how many.

        Raises:
            OSError: The connection is broken.
        """
        while (count := self._side.decrypt_into(memory)) < 0:
            self._side.hear(self._socket.recv(_CHUNK))
        return count

    def sendmsg(
        self,
        pieces: Iterable[memoryview],
        ancillary: Iterable[object] = (),
        flags: int = 0,
    ) -> int:
        """Sends the first bytes of some pieces of memory; returns how many.

        Raises:
            BlockingIOError: The socket takes no more bytes now. The next call must be with the same pieces.
            OSError: The connection is broken.
        """
        if not self._carried:
            # Encrypted once: TLS numbers its records, so after a `BlockingIOError` the same bytes must go out.
            piece = next((piece for piece in pieces if len(piece)), memoryview(b""))[:_CHUNK]
            self._unsent = memoryview(self._side.encrypt(piece)) if len(piece) else piece
            self._carried = len(piece)
        while self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent, flags) :]
        carried = self._carried
        self._carried = 0
        return carried

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        """Sets an option of the socket."""
        self._socket.setsockopt(level, option, value)


def refusal(error: ssl.SSLError) -> str:
    """Returns, in a line, why a connection was refused by this side or by the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is refused: {error.verify_message}"
    return f"no connection by TLS: {_words(error)}"


def why_refused(host: str, port: int, folder: str, seconds: float) -> str:
    """Returns, in a line, why a server and this side do not trust each other; empty if there is no such reason.

    gRPC does not tell a refused certificate from a server that is gone. So a client asks a second time, by this
    function. The server's host name is checked.

    Args:
        host: Name or IP address of the server.
        port: Port of the server.
        folder: Folder of this side's certificates.
        seconds: Longest wait for the server.
    """
    try:
        context = _context(Path(folder), is_server=False)
        context.check_hostname = True
        # A gRPC server may refuse a connection that does not ask for HTTP/2.
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((host, port), seconds) as connection:
            encrypted = context.wrap_socket(connection, server_hostname=host)
            return _welcome(encrypted)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # the server went in the middle of the handshake
        return ""
    except ssl.SSLError as error:
        return refusal(error)
    except (OSError, ValueError):  # gone, or silent: no question of trust
        return ""


def _welcome(encrypted: ssl.SSLSocket) -> str:
    """Waits for the first byte of a server. Returns the reason if there is none.

    The server checks the certificate of this side after the handshake of this side. gRPC hangs up on a certificate that
    is not accepted, and gives no reason. Otherwise gRPC speaks first.
    """
    with encrypted:
        try:
            spoke = encrypted.recv(1)
        except ConnectionResetError:
            spoke = b""
    return "" if spoke else f"the server does not accept {CERTIFICATE}"
