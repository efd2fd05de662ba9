"""Signatures of bundles by OpenSSF Model Signing: who exported it,
where hashes only say that nothing changed since.

The signature lies beside the bundle, as FOLDER.sig, and covers every file in it, the manifest included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.installed import missing


def signature_path(folder: Path) -> Path:
    """-> where the signature of the bundle `folder` lies."""
    return folder.with_name(f"{folder.name}.sig")


def sign_bundle(folder: Path, private_key: Path) -> Path:
    """Sign `folder` with an elliptic-curve private key (PEM); -> the signature.
    Raises UsageError for an unusable key."""
    path = signature_path(folder)
    signer(private_key).sign(folder, path)
    return path


def signer(private_key: Path) -> Any:
    """-> what signs with this key. Raises UsageError for an unusable key,
    or where model-signing is not installed."""
    try:
        return _module("signing").Config().use_elliptic_key_signer(private_key=_key(private_key))
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{private_key} cannot sign ({error}); give an unencrypted elliptic-curve key in PEM."
        ) from error


def check_signature(folder: Path, public_key: Path) -> None:
    """Raises CheckError where the bundle is not what the owner of the key signed,
    UsageError for an unusable key."""
    verifying = _module("verifying")
    path = signature_path(folder)
    if not path.is_file():
        raise CheckError(
            f"{folder} has no signature ({path} is missing); copy it too, or export with --sign KEY."
        )
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=_key(public_key))
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{public_key} is no public key ({error}); give an elliptic-curve public key in PEM."
        ) from error
    try:
        verifier.verify(folder, path)
    except Exception as error:  # cryptography, JSON and model-signing each raise their own
        reason = str(error).strip() or type(error).__name__
        raise CheckError(
            f"{path} is not a signature of {folder} by this key ({reason}); do not use this bundle."
        ) from error


def _key(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"there is no key {path}; give a PEM file.")
    return path


def _module(name: str) -> Any:
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise missing("model_signing") from error
    return getattr(model_signing, name)
