"""What crosses between server and clients: bytes, codecs, compression."""
