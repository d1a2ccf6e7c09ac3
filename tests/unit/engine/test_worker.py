from __future__ import annotations

import threading

from engine.worker import Abort, Close, Forget, Mailbox, Message


def test_messages_are_taken_in_the_order_they_were_put() -> None:
    mailbox = Mailbox[Message]()
    messages: list[Message] = [Abort("a"), Forget(b"s"), Abort("b"), Close()]
    for message in messages:
        mailbox.put(message)
    assert [mailbox.poll() for _ in messages] == messages
    assert mailbox.poll() is None
    assert mailbox.get(0.001) is None


def test_a_salt_that_is_to_be_forgotten_waits_once_and_may_come_again_when_it_was_taken() -> None:
    mailbox = Mailbox[Message]()
    for _ in range(1000):
        mailbox.put(Forget(b"one"))
        mailbox.put(Forget(b"two"))
    assert [mailbox.poll(), mailbox.poll(), mailbox.poll()] == [Forget(b"one"), Forget(b"two"), None]
    mailbox.put(Forget(b"one"))
    assert mailbox.poll() == Forget(b"one")


def test_what_many_threads_put_is_all_taken() -> None:
    mailbox = Mailbox[Message]()
    threads = [
        threading.Thread(target=lambda n=n: [mailbox.put(Abort(f"{n}-{i}")) for i in range(500)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    taken = [mailbox.get() for _ in range(2000)]
    for thread in threads:
        thread.join()
    for n in range(4):
        assert [m.request_id for m in taken if isinstance(m, Abort) and m.request_id.startswith(f"{n}-")] == [
            f"{n}-{i}" for i in range(500)
        ]
