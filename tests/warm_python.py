"""A `python` that starts at once, and does less: for the small form of tests/test_readme_commands.py.

    python tests/warm_python.py serve SOCKET                    loads the libraries, then waits
    python -IS tests/warm_python.py run SOCKET 03_tree.py ...   as `python 03_tree.py ...`, in a fork of it

Of each command's options the fork lowers those below, whatever the command line says.
"""
import argparse
import json
import os
import socket
import sys
import traceback
import types

MOST = {"num_prompts": 4, "passes": 1, "show": 3}  # --show: the last of four prompts


def serve(address, model):
    """Fork for one command after the other, without end; the client gets its exit status."""
    import peft
    import transformers
    transformers.AutoProcessor.from_pretrained(model)  # each imports more
    transformers.AutoModelForMultimodalLM.from_pretrained(model)
    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda parser: lowered(parse_args(parser))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.part")
    listener.listen()
    os.rename(f"{address}.part", address)  # from now on a client finds it
    while True:
        connection, _ = listener.accept()
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        child = os.fork()
        if child == 0:
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
            status = execute(*json.loads(message))
            sys.stdout.flush()
            os._exit(status)  # at once: to tear all libraries down would take a second
        for descriptor in descriptors:
            os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(status).encode())
        connection.close()


def lowered(args):
    for name in MOST.keys() & vars(args).keys():
        setattr(args, name, min(getattr(args, name), MOST[name]))
    return args


def execute(command, folder):
    """What `python` does with a command, a script and its options, or nothing and code on stdin: its
    exit status."""
    os.chdir(folder)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = command or [""]
    sys.path[0] = os.path.dirname(os.path.abspath(command[0])) if command else ""
    main.__file__ = sys.argv[0]
    source = open(command[0], encoding="utf-8").read() if command else sys.stdin.read()
    try:
        exec(compile(source, sys.argv[0] or "<stdin>", "exec"), vars(main))
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def ask(address, command):
    """The exit status of a command that the server has run for us, with our stdin, stdout and stderr."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        message = json.dumps([command, os.getcwd()]).encode()
        socket.send_fds(connection, [message], [0, 1, 2])
        return int(connection.recv(16) or 1)


if __name__ == "__main__":
    role, address, *command = sys.argv[1:]
    if role == "serve":
        serve(address, "tests/demo/model")
    sys.exit(ask(address, command))
