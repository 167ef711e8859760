"""Files of a Hub repository, downloaded and cached by huggingface_hub and checked against the Hub's hashes."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

HUB_VARIABLE = "TIMM_DFS_HUB"
"""Environment variable with a Hub namespace, or a local folder of model folders, to take weights by name from."""

_DIGESTS = {
    40: lambda data: hashlib.sha1(b"blob %d\0" % len(data) + data),  # git's id, of small files
    64: hashlib.sha256,  # of large files
}


def without_token(text: str) -> str:
    """A text, such as a server's message, with the user's token masked."""
    token = get_token()
    return text.replace(token, "***") if token else text


def fetch(repo: str, file: str, cache_dir: str | Path | None = None) -> Path:
    """Download a file of a Hub repository into huggingface_hub's cache, unless it is there already.

    huggingface_hub compares sizes only; here the content is also compared with the hash that the Hub gave for it. A
    file that differs is deleted from the cache.

    Args:
        repo: ``user/name``, or ``user/name@revision``.
        file: Path in the repository.
        cache_dir: Folder of the cache; by default huggingface_hub's own.

    Raises:
        FileNotFoundError: If the file is not in the cache and the Hub cannot be reached, or the repository lacks it.
        OSError: If the Hub refuses the request or the content is damaged.
    """
    repo_id, _, revision = repo.partition("@")
    try:
        path = Path(hf_hub_download(repo_id, file, revision=revision or None, cache_dir=cache_dir))
    except LocalEntryNotFoundError as error:
        reason = without_token(" ".join(str(error.__cause__ or error).split()))
        raise FileNotFoundError(
            f"{file} of {repo} is not in the cache and could not be downloaded ({reason}). Load it once with a "
            f"connection (and without HF_HUB_OFFLINE); or give a folder, local-dir:…, "
            f"or {HUB_VARIABLE}=folder for models by name."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"The Hub repository {repo} has no {file}.") from error
    except HfHubHTTPError as error:
        error.args = (without_token(str(error)),)
        raise
    except HTTPError as error:  # the connection broke
        raise ConnectionError(f"Downloading {file} of {repo} failed ({error}); try again.") from error
    _check_content(path, repo, file)
    return path


def _check_content(path: Path, repo: str, file: str) -> None:
    """Compare a cached file with its name: the hash of its content, unless the platform has no symbolic links."""
    blob = path.resolve()
    digest = _DIGESTS.get(len(blob.name)) if re.fullmatch("[0-9a-f]+", blob.name) else None
    if digest is not None and digest(blob.read_bytes()).hexdigest() != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise OSError(f"{file} of {repo} arrived damaged (its hash is not {blob.name}) and was deleted; try again.")
