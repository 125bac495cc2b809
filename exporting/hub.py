"""The Hugging Face Hub: names of repositories there, and uploading a folder."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id


def check(name: str) -> None:
    """Raise ValueError if `name` is no name of a repository, or nobody is logged in. Needs no network."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub {name!r}: is no name on the Hub, such as user/my_vit ({error})") from error
    if huggingface_hub.get_token() is None:
        raise ValueError(f"--push_to_hub {name}: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN")


def data_set(name: str) -> str | None:
    """Return the name on the Hub of a `--dataset hfds/NAME`; None for any other, such as a local folder."""
    source, _, place = name.partition("/")
    if source != "hfds" or Path(place).exists():
        return None
    try:
        validate_repo_id(place)
    except HFValidationError:
        return None
    return place


def push(folder: Path, files: tuple[str, ...], name: str) -> str:
    """Upload these files of a folder to the repository `name`, which is made, private, if need be; return its address.

    Raises:
        ValueError: the Hub cannot be reached, or does not take it.
    """
    api = huggingface_hub.HfApi()
    try:
        place = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=place.repo_id, folder_path=folder, allow_patterns=list(files))
    except Exception as error:  # of the network, of the Hub, of many classes
        raise ValueError(
            f"--push_to_hub {name}: {folder} is written, but not uploaded ({error}); try again with the same command "
            "and --overwrite, which writes README.md anew"
        ) from error
    return str(place)
