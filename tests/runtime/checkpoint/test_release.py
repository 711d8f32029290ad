"""Releases of megatron-core that are not supported are refused by name."""

from __future__ import annotations

import pytest

from moeless_opt.runtime.checkpoint import release


@pytest.mark.parametrize(
    ("found", "triton", "message"),
    [
        ("0.15.3", True, "megatron-core 0.15.3 is not supported, 0.16.1 to 0.19 are"),
        ("0.20.0rc1", True, "megatron-core 0.20.0rc1 is not supported"),
        ("1.0", True, "megatron-core 1.0 is not supported"),
        ("0.19.2", False, "megatron-core 0.19.2 imports triton, which is not installed"),
        ("0.16.1", False, ""),
        ("0.19.2", True, ""),
    ],
)
def test_releases(found: str, triton: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "version", lambda name: found)
    monkeypatch.setattr(release, "find_spec", lambda name: object() if triton else None)
    if message:
        with pytest.raises(ImportError, match=message):
            release.check_megatron()
    else:
        release.check_megatron()
