"""gcp-storage-emulator with what Google's store has besides, and OCDBT needs: generations and conditions on them.

python tests/gcs_server.py --data-dir=DIR start --port=N
"""

import http.server
import threading

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def _generation(storage, bucket: str, name: str) -> int:
    """0 where there is no such object."""
    try:
        return int(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return 0


def conditional(handler):
    """A handler that looks at the conditions of a request first, and says which generation of an object it gives."""

    def handle(request, response, storage, *arguments, **options):
        query, bucket = request.query, request.params["bucket_name"]
        name = request.params.get("object_id") or query.get("name", [""])[0]
        found = _generation(storage, bucket, name)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"][0]) != found:
            response.status = http.HTTPStatus.PRECONDITION_FAILED
        elif "ifGenerationNotMatch" in query and found and int(query["ifGenerationNotMatch"][0]) == found:
            response.status = http.HTTPStatus.NOT_MODIFIED
        else:
            if found:
                response["x-goog-generation"] = str(found)
            handler(request, response, storage, *arguments, **options)

    return handle


if __name__ == "__main__":
    for handler in ("get", "download", "insert", "delete"):  # `get` calls `download` by its name
        setattr(objects, handler, conditional(getattr(objects, handler)))
    from gcp_storage_emulator import server  # takes the handlers as they are now

    # A client that holds an idle connection open must not keep others waiting; requests are still done in turn.
    http.server.HTTPServer = http.server.ThreadingHTTPServer
    turn, handle = threading.Lock(), server.Router.handle

    def handle_in_turn(self, method):
        with turn:
            handle(self, method)

    server.Router.handle = handle_in_turn
    from gcp_storage_emulator.__main__ import main

    main()
