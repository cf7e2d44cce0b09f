// The page of react_suite.js: a chat as an application with convex/react has it. What it shows is what the suite reads.
import React from 'react';
import { createRoot } from 'react-dom/client';
import { ConvexProviderWithAuth, ConvexReactClient, useConvexConnectionState, useMutation, useQuery } from 'convex/react';
import { makeFunctionReference as ref } from 'convex/server';

const { base, token, org, channel, extra } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const client = new ConvexReactClient(base, { skipConvexDeploymentUrlCheck: true });
// What an application's event handlers call: the value, or what the error carries.
window.call = (kind, name, args) => client[kind](ref(name), args).then((value) => ({ value }), (error) => ({ refused: error.data ?? String(error) }));

function useAuth() {
  const fetchAccessToken = React.useCallback(async () => token || null, []);
  return React.useMemo(() => ({ isLoading: false, isAuthenticated: true, fetchAccessToken }), [fetchAccessToken]);
}

// A query that fails throws inside its component: this one shows the error, and only in its own place.
class Boundary extends React.Component {
  state = { error: null };
  static getDerivedStateFromError(error) {
    return { error };
  }
  render() {
    const { error } = this.state;
    if (error === null) return this.props.children;
    return <p className="refused" data-code={error.data?.code} data-limit={error.data?.limit}>{error.data?.message ?? String(error)}</p>;
  }
}

function Messages({ channel }) {
  const messages = useQuery(ref('messages:list'), { channel });
  if (messages === undefined) return <p className="loading">…</p>;
  return <ul className="messages">{messages.map((it, at) => <li key={at}>{it.body}</li>)}</ul>;
}

function Sender() {
  const send = useMutation(ref('messages:send'));
  const [error, setError] = React.useState('');
  const submit = (event) => {
    event.preventDefault();
    send({ channel, body: event.target.elements.body.value }).then(() => setError(''), (error) => setError(error.data?.code ?? String(error)));
  };
  return <form onSubmit={submit}><input name="body" placeholder="say something" /> <button>Send</button><output>{error}</output></form>;
}

function Connection() {
  const { isWebSocketConnected, connectionCount } = useConvexConnectionState();
  return <footer data-count={connectionCount}>{isWebSocketConnected ? 'live' : 'connecting'}</footer>;
}

createRoot(document.getElementById('page')).render(
  <ConvexProviderWithAuth client={client} useAuth={useAuth}>
    <h1>{org} · #{channel}</h1>
    <section id="main"><Boundary><Messages channel={channel} /></Boundary></section>
    <Sender />
    {Array.from({ length: Number(extra ?? 0) }, (_, at) => <section key={at} className="extra"><Boundary><Messages channel={`${channel}-${at}`} /></Boundary></section>)}
    <Connection />
  </ConvexProviderWithAuth>,
);
