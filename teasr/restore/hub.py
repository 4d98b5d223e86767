"""Models on the Hugging Face hub: download a repository, and upload a saved or exported folder.

The environment variables of huggingface_hub apply: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

from pathlib import Path

from teasr.util.optional import needed_for

FILES = ("*.safetensors", "*.json", "*.yaml", "*.md")  # of a repository, that restoring may need


def download(name: str) -> Path:
    """Return the folder, in the hub's cache, of the model `owner/name`.

    Raises ValueError if there is no such model, or if the hub cannot be reached and the cache does not have it.
    """
    with needed_for(f"loading {name} from the hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except RepositoryNotFoundError:
        why = "the hub has no model of that name that you can access"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = f"the hub cannot be reached ({_short(error)})"
    raise ValueError(f"model {name}: no such folder exists, and {why}")


def upload(folder: Path, name: str, private: bool = False) -> str:
    """Upload the files of a folder to the model `owner/name`, which is created if needed; return its address.

    private: whether a newly created model is private. Raises ValueError if the hub refuses or cannot be reached.
    """
    with needed_for(f"uploading to {name} on the hub"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message="teasr export")
        return address
    except HFValidationError as error:
        raise ValueError(f"{name} is not a name of a model on the hub ({_short(error)}): use owner/name") from None
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        denied = getattr(getattr(error, "response", None), "status_code", 401) in (401, 403)
        cure = "log in with `hf auth login`, or set HF_TOKEN to a token that may write" if denied else "try again later"
        raise ValueError(f"{folder} could not be uploaded to {name} ({_short(error)}): {cure}") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
