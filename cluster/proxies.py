"""Proxies that the environment puts between here and a server: used, and named where one does not
answer."""

from __future__ import annotations

from urllib.parse import urlsplit


def way_to(url: str) -> str | None:
    """The proxy that http_proxy and its like name for `url`, with its password, which is not to be
    shown; None where they name none, or no_proxy has the host."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return None
    return str(proxy) if "://" in proxy else f"http://{proxy}"


def proxy_of(url: str) -> str | None:
    """That proxy without its password; or None."""
    proxy = way_to(url)
    if proxy is None:
        return None
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def advice(url: str) -> str:
    """What to do about the proxy on the way to `url`; empty where there is none."""
    proxy = proxy_of(url)
    if proxy is None:
        return ""
    host = urlsplit(url).hostname
    return (
        f"the proxy {proxy} (http_proxy, https_proxy or all_proxy) stands between; add "
        f"{host} to no_proxy to go past it"
    )
