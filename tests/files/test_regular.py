"""Files that are read whole: regular ones, of at most so many bytes."""

import os

import pytest

from kvrun.files.regular import read_bytes, read_text


def test_content_and_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\xc3\xa9\0")
    assert read_bytes(str(path), 9) == path.read_bytes() and read_text(str(path), 9) == "a\r\né\0"
    with pytest.raises(OSError, match="9 bytes; 8 are the limit"):
        read_bytes(str(path), 8)
    path.write_bytes(b"")
    assert read_text(str(path), 0) == ""


def test_links_are_followed(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert read_text(str(tmp_path / "b"), 1) == "x"


def test_what_is_no_text(tmp_path):
    for content, byte in ((b"ab\xff", 2), ("é".encode("latin-1"), 0), ("é".encode("utf-16"), 0)):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(OSError, match=rf"not UTF-8 \(byte {byte}\)"):
            read_text(str(tmp_path / "a"), 10)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="there is no /proc")
def test_a_file_that_says_it_is_empty(tmp_path):
    """Sizes of the kernel's files are 0; what they hold is read up to the limit all the same."""
    assert b"python" in read_bytes("/proc/self/maps", 1 << 24)
    with pytest.raises(OSError, match="101 bytes; 100 are the limit"):
        read_bytes("/proc/self/maps", 100)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_bytes(str(tmp_path / "a"), 1)
    with pytest.raises(OSError, match="NUL"):
        read_bytes("a\0b", 1)
