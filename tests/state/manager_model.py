"""What the manager's state machine compares with: plain lists, and a pool that holds one number a slot."""

import torch

from pagedkv import TierError

NAMESPACES = [None, "", "a"]


class ContentPool:
    """One number a slot in place of keys and values; -1 is never written."""

    device = torch.device("cpu")

    def __init__(self, num_pages, page_size):
        self.num_pages, self.page_size = num_pages, page_size
        self.content = torch.full((num_pages, page_size), -1, dtype=torch.int64)

    def copy_pages(self, src, dst):
        self.content[dst] = self.content[src]

    def write(self, slots, content):
        self.content.view(-1)[slots] = torch.tensor(content, dtype=torch.int64)

    def read(self, pages, num_tokens):
        return self.content[list(pages)].reshape(-1)[:num_tokens].tolist()


class ContentTier:
    """Room for some pages of a ContentPool."""

    def __init__(self, pool, num_pages):
        self.pool, self.num_free, self.saved = pool, num_pages, {}

    def save(self, pages):
        if len(pages) > self.num_free:
            raise TierError("no room")
        self.num_free -= len(pages)
        ticket = object()
        self.saved[ticket] = self.pool.content[pages].clone()
        return ticket

    def load(self, ticket, pages):
        wanted = pages >= 0
        self.pool.content[pages[wanted]] = self.saved[ticket][wanted]

    def drop(self, ticket):
        self.num_free += len(self.saved.pop(ticket))


class Shadow:
    """What the model knows of one open sequence; `tokens` counts reserved ones, written at once.

    pages: its page ids, those that a window gave back as they were. is_new: it has no slots of its own yet.
    """

    def __init__(self, seq, tokens, namespace):
        self.seq, self.tokens, self.namespace = seq, tokens, namespace
        self.pages = seq.page_ids
        self.is_new = True

    @property
    def is_away(self):
        return self.seq.state != "on pages"

    def content(self):
        """What its slots must hold: keys and values of equal tokens differ between namespaces."""
        return [100 * NAMESPACES.index(self.namespace) + token for token in self.tokens]

    def expected_pages(self):
        """Its page ids, with -1 for whole pages that no later token can see."""
        if self.is_away:
            return ()
        window, page_size = self.seq.window, self.seq._ledger.page_size
        gone = 0 if window is None else self.seq.num_pages_given_back
        if window is not None:
            # A truncate of tokens without ids keeps what was given back; it is never more than the window allows.
            assert gone * page_size <= max(0, self.seq.num_committed - window + 1)
        return (-1,) * gone + self.pages[gone:]

    def locked_without_a_name(self):
        """Pages under its lock that it does not name any more."""
        handle = self.seq.lock_handle
        num_locked = 0 if handle is None else handle.num_tokens // self.seq._ledger.page_size
        return set(self.pages[: min(num_locked, self.seq.num_pages_given_back)])
