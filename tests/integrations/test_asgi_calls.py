"""A web application that is called without a socket: the same responses, in parts, and clients that leave."""

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from kvfold.integrations.replicas import Call, answered

left = []


async def echo(request: Request) -> JSONResponse:
    body = (await request.body()).decode()
    return JSONResponse({"body": body, "query": str(request.query_params), "host": request.headers["host"]})


async def counted(request: Request) -> StreamingResponse:
    async def numbers():
        try:
            for number in range(3):
                yield f"{number}\n"
                await asyncio.sleep(0.01)
            if "forever" in request.query_params:
                await asyncio.sleep(60)
        finally:
            left.append(str(request.query_params))

    return StreamingResponse(numbers(), 201, headers={"x-kind": "numbers"})


async def broken(request: Request) -> StreamingResponse:
    async def nothing():
        raise KeyError
        yield b""

    return StreamingResponse(nothing())


APP = Starlette(
    routes=[Route("/echo", echo, methods=["POST"]), Route("/counted", counted), Route("/broken", broken)],
)


def parts(call: Call, most: int | None = None) -> list:
    async def run():
        found, stream = [], answered(APP, call)
        async for part in stream:
            found.append(part)
            if len(found) == most:
                await stream.aclose()
                break
        return found

    return asyncio.run(asyncio.wait_for(run(), 10))


def test_a_whole_answer_is_one_part():
    call = Call(method="POST", path="/echo", query=b"a=1", headers=((b"host", b"here"),), body=b"text")
    (part,) = parts(call)
    assert part.status == 200 and (b"content-type", b"application/json") in part.headers
    assert part.body == b'{"body":"text","query":"a=1","host":"here"}'


def test_a_stream_comes_as_it_is_made():
    found = parts(Call(method="GET", path="/counted"))
    assert [part.status for part in found] == [201, 0, 0]
    assert (b"x-kind", b"numbers") in found[0].headers
    assert b"".join(part.body for part in found) == b"0\n1\n2\n"


def test_who_leaves_early_ends_the_work():
    left.clear()
    assert len(parts(Call(method="GET", path="/counted", query=b"forever=1"), most=2)) == 2
    assert left == ["forever=1"]


def test_what_fails_before_it_begins_has_no_head():
    with pytest.raises(RuntimeError, match="before its response did"):
        parts(Call(method="GET", path="/broken"))
    assert parts(Call(method="GET", path="/nowhere"))[0].status == 404
