"""Publishes a checkpoint with its model card on the Hugging Face Hub."""

from pathlib import Path

from compress.errors import UserError
from compress.store.checkpoint import verify_shared


def check_name(name: str) -> None:
    """Checks the form of a repository's name.

    Raises:
        UserError: It is not ``owner/name`` as the Hub allows it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    expected = f"publish={name}: expected owner/name of a repository on the Hugging Face Hub"
    if name.count("/") != 1:
        raise UserError(expected)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{expected} ({error})") from error


def check(name: str) -> None:
    """Checks before a run that its checkpoint can be published when it ends.

    Raises:
        UserError: There is no connection, no token, or the token may not write there.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"publish={name}: HF_HUB_OFFLINE is set: unset it, or take publish=null")
    if get_token() is None:
        raise UserError(
            f"publish={name}: there is no token of the Hugging Face Hub: run `hf auth login` or set HF_TOKEN"
        )
    try:
        account = HfApi().whoami()
    except Exception as error:  # noqa: BLE001 - no connection, an expired token, an error of the server
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"publish={name}: the Hub cannot be asked whose token this is ({reason})") from error
    owners = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    if name.partition("/")[0] not in owners:
        raise UserError(f"publish={name}: the token may write for {', '.join(owners)} only")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"publish={name}: the token of {account['name']} may only read: set one that may write")


def publish(folder: Path, name: str) -> dict[str, str]:
    """Uploads a checkpoint, its model card as the repository's; other files of the repository are removed.

    The repository is made if it is missing, public or private as the owner's account has it.

    Args:
        folder: The checkpoint.
        name: ``owner/name``.

    Returns:
        ``name``, the ``commit`` and its ``url``.

    Raises:
        UserError: The checkpoint is damaged or was never read back, or the upload failed.
    """
    from huggingface_hub import HfApi

    verify_shared(folder)
    try:
        api = HfApi()
        api.create_repo(name, repo_type="model", exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="A checkpoint of compress", delete_patterns="*"
        )
    except Exception as error:  # noqa: BLE001 - of the network, the server or the account
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"publish={name}: the upload failed ({reason}); the checkpoint is in {folder}: run the same command again, "
            "all its stages are in the store"
        ) from error
    return {"name": name, "commit": commit.oid, "url": f"https://huggingface.co/{name}/tree/{commit.oid}"}
