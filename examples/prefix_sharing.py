"""A manager gives the second request the pages that the first one filled; what is used is never taken back."""

import pagedkv

manager = pagedkv.KVCacheManager(64, page_size=4)
system = list(range(100, 110))  # ten tokens that every request begins with: two full pages and a half

first = manager.open([*system, 1, 2, 3])
slots = first.append(13)  # keys and values of 13 tokens go to these slots
first.commit([*system, 1, 2, 3])  # and are published, full page by full page

second = manager.open([*system, 7, 8])
print(f"{second.num_cached_tokens} of 12 tokens need no computing")
second.append(12 - second.num_cached_tokens)
second.commit([*system, 7, 8][second.num_cached_tokens :])
print(manager.page_table([first, second]).to_dense())

first.close()
second.close()
pagedkv.check_integrity(manager)
print(f"{manager.stats().cached} pages stay cached, {manager.stats().free} are free")
