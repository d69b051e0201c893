"""--push_to_hub: what it needs, before training; the model's folder to the Hub, after it."""

import sys
from argparse import Namespace

from opt.errors import UserError, in_a_line
from opt.train import export


def check(plan: Namespace) -> None:
    """Raise UserError unless the token may write to the repository, which is made if it is not
    there (not by --dry_run)."""
    repo = plan.push_to_hub
    from huggingface_hub import HfApi
    from huggingface_hub.utils import LocalTokenNotFoundError

    api, owner = HfApi(), repo.split("/")[0]
    try:
        me = api.whoami()
    except LocalTokenNotFoundError:
        raise UserError(
            f"--push_to_hub {repo} needs a token with write access: set HF_TOKEN, or "
            "`huggingface-cli login`"
        ) from None
    except Exception as error:  # HTTP, the network, offline mode: exceptions of many packages
        raise _refusal(repo, error) from error
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub {repo}: the token may only read; take one that may write")
    owners = [me["name"], *(org["name"] for org in me.get("orgs", []))]
    if owner not in owners:
        raise UserError(
            f"--push_to_hub {repo}: the token is of {me['name']}, who may not write there; the "
            f"owner must be one of {', '.join(owners)}"
        )
    if plan.dry_run:
        return
    try:
        api.create_repo(repo, exist_ok=True, private=plan.hub_private_repo or None)
    except Exception as error:
        raise _refusal(repo, error) from error


def _refusal(repo: str, error: Exception) -> UserError:
    return UserError(
        f"--push_to_hub {repo}: the Hub refuses, or cannot be reached ({in_a_line(error)})"
    )


def push(plan: Namespace) -> None:
    """Upload the model that was saved, by the main process alone. A Hub that fails now leaves a
    good model, and a line that says what to do."""
    from huggingface_hub import HfApi

    repo, folder = plan.push_to_hub, plan.output_path
    try:
        done = HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=plan.run_name or "OPT, fine-tuned with ColossalAI",
            # Checkpoints, logs, and whatever else lies in the folder, stay here
            allow_patterns=list(export.FILES),
            delete_patterns=list(export.OLD),
        )
    except Exception as error:
        print(
            f"not uploaded to {repo} ({in_a_line(error)}): "
            f"the model is in {folder}; huggingface-cli upload {repo} {folder} . --exclude "
            '"checkpoints/*"',
            file=sys.stderr,
            flush=True,
        )
        return
    print(f"uploaded the model to {done.repo_url}", flush=True)
