"""What others get to read, without secrets and without the paths of the machine that wrote it."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, get_token


HIDDEN = "..."

# A token of the Hub by its look; a flag that takes one, abbreviated too; user and password, and the query, of a URL.
_TOKEN = re.compile(r"(?:hf|api_org)_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}(?:[._-]\w+)*")
_TOKEN_FLAG = re.compile(r"(--(?:hub_t\w*|\w*token)(?:=|\s+))[^\s`]+")
_CREDENTIALS = re.compile(r"(?:(?<=://)[^/\s]+|(?<!\w)[\w.%+~-]+:[^/\s]+)@(?=[\w\[])")
_QUERY = re.compile(r"(\w://[^\s?\"'`|<>()]+)\?[^\s\"'`|<>()]+")

# A path that starts at the root, at a home or above the working directory, as a value and inside a text.
_OUTSIDE = re.compile(r"(?:file:|~|/|\.\.(?:[/\\]|$)|[A-Za-z]:[/\\]|\\\\)")
_OUTSIDE_IN_TEXT = re.compile(
    r"(?<![\w.:/\\~<-])(?:(?:file:/{1,3}|~[\w.-]*|\.\.)?/[^\s/,;'\"`|()<>][^\s,;'\"`|()<>]*|[A-Za-z]:\\[^\s,;'\"`|()<>]+)"
)
_HOMES = ("home", "users")


def known_secrets(*given: str | None) -> list[str]:
    """Those given, and the tokens of the Hub that this process could use: of its environment and of its logins."""
    found = [*given, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), get_token()]
    for path in (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH):
        if os.path.isfile(path):
            # One token, or lines such as "hf_token = hf_..." for each login.
            lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
            found += [line.split("=")[-1] for line in lines if not line.lstrip().startswith("[")]
    # The longest first: one may be a part of another.
    return sorted({secret.strip() for secret in found if secret and secret.strip()}, key=len, reverse=True)


def without_secrets(text: str, secrets: Sequence[str]) -> str:
    """A text without these secrets, whatever they stand in, and without what looks like one.

    Args:
        text: any.
        secrets: see [`known_secrets`]. One of fewer than 8 characters is struck out as a whole word only.

    Returns:
        the text with ``...`` for each secret, for tokens of the Hub that it doesn't know, for the words that follow a
        flag for tokens, and for the user, the password and the query of a URL.
    """
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
        else:
            text = re.sub(rf"(?<![^\W_]){re.escape(secret)}(?![^\W_])", lambda _: HIDDEN, text)
    text = _TOKEN_FLAG.sub(rf"\g<1>{HIDDEN}", _TOKEN.sub(HIDDEN, text))
    return _QUERY.sub(rf"\g<1>?{HIDDEN}", _CREDENTIALS.sub(f"{HIDDEN}@", text))


def without_paths(text: str) -> str:
    """A value without this machine's folders: of a path that leaves the working directory only the last part is left.

    A path inside the working directory stays, and so does any other text, in which such paths are shortened. What
    would be left of a home directory is its owner's name: nothing is.
    """
    if _OUTSIDE.match(text):
        return _last_part(text)
    if "/" in text and not re.search(r"\s|://", text) and os.path.normpath(text).split("/")[0] == "..":
        return _last_part(text)
    return _OUTSIDE_IN_TEXT.sub(lambda match: _last_part(match.group()), text)


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".")]
    if not parts or parts[-1].startswith("~") or parts[-1] in ("..", "file:") or parts[-1].endswith(":"):
        return HIDDEN
    is_home = len(parts) > 1 and parts[-2].lower() in _HOMES
    return HIDDEN if is_home or os.path.abspath(os.path.expanduser(path)) == str(Path.home()) else parts[-1]
